"""Checks: what a fit asks of its data before anything is written: numbers in range, labels and samples that can be used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adamerge.errors import ConfigError, DataError

if TYPE_CHECKING:
    from adamerge.backbones import Backbone
    from adamerge.data.base import Calibration


def check_arguments(data: Calibration) -> None:
    """Refuses arguments out of range, before any data set is opened.

    Raises:
        ConfigError: a number is out of range, or shots of data whose labels may not be read.
    """
    for name, least in (("batch_size", 1), ("eval_batch_size", 1), ("workers", 0)):
        if getattr(data, name) < least:
            raise ConfigError(f"data: {name} must be at least {least}, got {getattr(data, name)}")
    for name in ("calibration_samples", "shots"):
        if getattr(data, name) is not None and getattr(data, name) < 1:
            raise ConfigError(f"data: {name} must be at least 1, got {getattr(data, name)}")
    if data.shots is not None and not data.labelled:
        raise ConfigError(
            "data: shots are chosen by their labels, which an unlabelled objective may not use",
            expected="labelled: true, or calibration_samples instead of shots",
            got="labelled: false",
        )
    if not 0 <= data.unusable_share <= 1:
        raise ConfigError(f"data: unusable_share must be from 0 to 1, got {data.unusable_share}")


def check(data: Calibration, backbone: Backbone, validated: bool) -> None:
    """Reads what a fit reads: words, labels where they are used, and every sample of the splits that it draws from.

    Args:
        data: of the fit.
        backbone: that preprocesses the samples.
        validated: whether the fit scores the validation split.

    Raises:
        ConfigError: class names or templates cannot be used.
        DataError: a split is missing or empty, too many of its rows cannot be used, or a label is no class.
    """
    data.serve(backbone)
    fitted, scored = data.fitted, data.labelled_tasks("validation") if validated else []
    backbone.check_tasks(data.tasks)
    for task in fitted if data.labelled else []:
        data.labelling.check(data.rows(task, "calibration"), data.label_place(task, "calibration"))
    for task in scored:
        _check_scored_labels(data, task)
    for task in fitted:
        data.samples(task, "calibration")
    for task in scored:
        data.samples(task, "validation")


def _check_scored_labels(data: Calibration, task: str) -> None:
    """Checks the validation split's labels; a fit without labels has a way around a fault of them, which the error says."""
    try:
        data.labelling.check(data.rows(task, "validation"), data.label_place(task, "validation"))
    except DataError as error:
        todo = f"{error.todo}; or let the fit score nothing: trainer.limit_val_batches=0"
        raise DataError(error.what, expected=error.expected, got=error.got, todo=todo) from error
    for split, rows in data.splits(task).items():  # few rows may lack the last class, and all splits count alike
        data.labelling.check_numbering(rows, data.label_place(task, split))
