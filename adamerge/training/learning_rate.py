"""Learning rates: that of the model decides, and whoever configured an optimiser with another is told."""

from __future__ import annotations

import inspect

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer


def paced(optimizer: Optimizer, lr: float, setting: str, of: str) -> Optimizer:
    """The optimiser, at this rate.

    Args:
        optimizer: as configured.
        lr: its rate from now on.
        setting: what the rate is called: ``model.lr``.
        of: what the optimiser is called: ``model.optimizer``.
    """
    named = {group["lr"] for group in optimizer.param_groups} - {lr, _default(optimizer)}
    if named:
        rank_zero_warn(f"{of} was given lr={named.pop():g}, which is not used: {setting} decides, and is {lr:g}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    return optimizer


def _default(optimizer: Optimizer) -> object:
    """The rate of an optimiser that was given none."""
    parameter = inspect.signature(type(optimizer)).parameters.get("lr")
    return None if parameter is None else parameter.default
