"""Preparation: everything that can be known of a fit before it begins, asked before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

from adamerge.data import Calibration, NoData
from adamerge.errors import ConfigError
from adamerge.runs.config_parser import FitCLI
from adamerge.runs.trainer_settings import check_length
from adamerge.training import MergingModule
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
    data: Calibration = cli.datamodule
    trainer = cli.config.trainer
    learns = module.objective is not None
    if isinstance(data, NoData) and (learns or module.recalibrate_buffers):
        what = f"model.objective={type(module.objective).__name__}" if learns else "model.recalibrate_buffers"
        raise ConfigError(
            f"{what} needs data, and there are none",
            expected="a data section in the pool",
            got="data: null",
            todo="add one, or leave out what needs it: a method without an objective merges base and experts alone",
        )
    if learns:
        check_length(vars(trainer))
        if trainer.gradient_clip_val and not module.automatic_optimization:
            raise ConfigError(
                "trainer.gradient_clip_val is not for a search with two gradients in a step", todo="leave it out"
            )
        module.check_rates(trainer.max_steps)
        module.check(data, str(trainer.precision))
    if learns or module.recalibrate_buffers:
        data.check(module.merged.backbone, learns and _validates(cli))
    if learns:
        module.check_data(data)
    module.coefficients().check()  # what cannot be written after the fit is known before it
    return cli


def _validates(cli: FitCLI) -> bool:
    """Whether the fit looks at the validation split: to report, or to choose the step that is the result."""
    return cli.config.trainer.limit_val_batches != 0 or any(isinstance(one, KeepBest) for one in cli.callbacks)
