"""Preparation: all that can be known of a fit and its stages before it begins, asked before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from adamerge.io.unwritten import is_unwritten
from adamerge.runs.configuration import Configuration
from adamerge.runs.early_checks import Parts, checked_parts, fit_settings
from adamerge.runs.parser import read

if TYPE_CHECKING:  # what can be refused without Lightning is refused before it is imported
    from adamerge.runs.instantiate import Configured


def prepared(settings: Namespace, parts: Parts | None = None) -> Configured:
    """Returns a fit whose model, data and settings go together; whether all weights are finite is not checked.

    Args:
        settings: as ``read`` returns them.
        parts: made of them already; made now when None.

    Raises:
        AdamergeError: what can be wrong with configuration, models or data.
    """
    from adamerge.backbones.transformers import outlined
    from adamerge.runs.instantiate import Configured
    from adamerge.training.keep_best import KeepBest

    parts = checked_parts(settings) if parts is None else parts
    # where no inputs are seen nothing is run: names and shapes of a network are enough
    with nullcontext() if parts.method.sees_inputs else outlined():
        fit = Configured(settings, parts)
    # the validation split is looked at to report, or to choose the step that is the result
    chooses = any(isinstance(one, KeepBest) and one.validates for one in fit.callbacks)
    validated = settings.trainer.limit_val_batches != 0 or chooses
    fit.model.preflight(fit.datamodule, fit_settings(settings, validated))
    fit.model.coefficients().check()  # what cannot be written after the fit is known before it
    return fit


def checked(stages: Sequence[Configuration]) -> list[tuple[Namespace, Parts | None]]:
    """Returns settings and parts of each stage; they go together as far as that is known while nothing is opened.

    Args:
        stages: of a method; one where it has none.

    Raises:
        AdamergeError: what every verb refuses.
    """
    every: list[tuple[Namespace, Parts | None]] = []
    for stage in stages:
        settings, parts = read(stage), None
        with stage.named(), waiting(stage):
            parts = checked_parts(settings)
        every.append((settings, parts))
    return every


def validated(stages: Sequence[Configuration]) -> Configured:
    """Checks that a method can be fitted, each of its stages as far as it can be known before the earlier ones ran.

    Nothing is written, and no weight but those of heads is read.

    Returns:
        The configured fit of the method, or of its first stage.

    Raises:
        AdamergeError: it cannot.
    """
    first: Configured | None = None
    for stage in stages:
        settings = read(stage)
        with stage.named(), waiting(stage):
            fit = prepared(settings)
            first = first or fit
    assert first is not None, "a first stage waits for nothing"
    return first


@contextmanager
def waiting(stage: Configuration) -> Iterator[None]:
    """Suppresses an error of the block that comes from a file which an earlier stage has yet to write."""
    try:
        yield
    except Exception as error:  # whatever a part of the user's does about a file that is not there
        if stage.number < 2 or not is_unwritten(error):
            raise
