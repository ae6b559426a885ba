"""Preparation: everything that can be known of a fit before it begins, asked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

from adamerge.runs.config_parser import FitCLI
from adamerge.runs.trainer_settings import check_length
from adamerge.training.fit_checks import FitSettings
from adamerge.training.module import MergingModule
from adamerge.training.selection import KeepBest


def prepared(arguments: Sequence[str]) -> FitCLI:
    """Model, data and settings of a fit, made and found to go together; whether all weights are finite is not looked at.

    Args:
        arguments: ``--config POOL --config METHOD`` and overrides, as on the command line.

    Raises:
        AdamergeError: what can be wrong with configuration, models or data.
    """
    cli = FitCLI(arguments)
    module: MergingModule = cli.model
    trainer = cli.config.trainer
    if module.objective is not None:
        check_length(vars(trainer))
    settings = FitSettings(trainer.max_steps, str(trainer.precision), bool(trainer.gradient_clip_val), _validates(cli))
    module.preflight(cli.datamodule, settings)
    module.coefficients().check()  # what cannot be written after the fit is known before it
    return cli


def _validates(cli: FitCLI) -> bool:
    """Whether the fit looks at the validation split: to report, or to choose the step that is the result."""
    return cli.config.trainer.limit_val_batches != 0 or any(isinstance(one, KeepBest) for one in cli.callbacks)
