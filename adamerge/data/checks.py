"""Checks: all that a fit is going to read of its data, read before anything is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adamerge.data.held_out import calibration_splits
from adamerge.errors import DataError

if TYPE_CHECKING:
    from adamerge.backbones import Backbone
    from adamerge.data.base import Calibration


def check(data: Calibration, backbone: Backbone, validated: bool) -> None:
    """Reads all that a fit of this backbone is going to read, before anything is written.

    The labels of the calibration split are read if they are the objective's, those of the validation split if it is
    scored, and those of the test split never: they do not change a fit, and so do not stop it.

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
        for split in calibration_splits(data):
            data.samples(task, split)
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
