"""Learning rates: the search's own rate is used, and whoever configured an optimiser with another one is warned."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adamerge.errors import ConfigError
from adamerge.training.schedules import Schedule, Scheduler, check_schedule, scheduled

OptimizerCallable = Callable[[Iterable[nn.Parameter]], Optimizer]
"""Makes one of torch's optimisers of some parameters."""


@dataclass(frozen=True)
class PacedOptimizer:
    """Makes an optimiser with its learning rate and schedule, by the names that the three have in a configuration.

    Args:
        optimizer: makes it.
        lr: learning rate, of every parameter group.
        schedule: of the rate; constant when None.
        prefix: of the three names in ``model.search``.

    Raises:
        ConfigError: the rate is not positive.
    """

    optimizer: OptimizerCallable
    lr: float
    schedule: Schedule | Scheduler | None = None
    prefix: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise ConfigError(f"{self._named('lr')} must be positive, got {self.lr}")

    def check(self, steps: int) -> None:
        """Refuses a schedule that does not fit a run of so many steps, before there is anything to learn.

        Raises:
            ConfigError: it cannot.
        """
        check_schedule(self.optimizer, self.lr, self.schedule, steps, self._named("schedule"))

    def of(self, parameters: Iterable[nn.Parameter], steps: int) -> tuple[Optimizer, LRScheduler | None]:
        """Makes optimiser and schedule of these parameters, for a fit of so many steps.

        Raises:
            ConfigError: the schedule does not go with it.
        """
        optimizer = paced(self.optimizer(parameters), self.lr, self._named("lr"), self._named("optimizer"))
        if self.schedule is None:
            return optimizer, None
        return optimizer, scheduled(optimizer, self.schedule, steps, self._named("schedule"))

    def _named(self, key: str) -> str:
        return f"model.search.{self.prefix}{key}"


def paced(optimizer: Optimizer, lr: float, setting: str, of: str) -> Optimizer:
    """Returns the optimiser, at this rate.

    Args:
        optimizer: as configured.
        lr: its rate from now on.
        setting: what the rate is called: ``model.search.lr``.
        of: what the optimiser is called: ``model.search.optimizer``.
    """
    named = {group["lr"] for group in optimizer.param_groups} - {lr, _default(optimizer)}
    if named:
        from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # a configuration is read without Lightning

        rank_zero_warn(f"{of} was given lr={named.pop():g}, which is not used: {setting} decides, and is {lr:g}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    return optimizer


def _default(optimizer: Optimizer) -> object:
    """Returns the rate of an optimiser that was given none."""
    parameter = inspect.signature(type(optimizer)).parameters.get("lr")
    return None if parameter is None else parameter.default
