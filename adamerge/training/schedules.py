"""Schedules: how a learning rate changes over a fit of any length, as a share of it; which schedules are refused."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from adamerge.errors import ConfigError

Scheduler = Callable[[Optimizer], LRScheduler]
"""Makes one of torch's schedulers, whose numbers of steps and rates are its own."""


class Schedule(ABC):
    """A learning rate over a fit: the share of ``lr`` that each step takes, from the fit's own length."""

    @abstractmethod
    def share(self, step: int, steps: int) -> float:
        """Returns the share of the rate after ``step`` of ``steps`` steps; after all, where the schedule ends."""


class CosineDecay(Schedule):
    """Half a cosine wave from the rate down to a floor: ``floor + (1 - floor) (1 + cos(pi through step / steps)) / 2``.

    Args:
        floor: share of the rate at the wave's end.
        through: share of the half wave that the fit goes through; below 1 the rate ends above the floor.

    Raises:
        ConfigError: a number is no share, or the floor is not below the rate.

    Reference: SGDR (Loshchilov and Hutter, 2017), https://arxiv.org/abs/1608.03983.
    """

    def __init__(self, floor: float = 0.0, through: float = 1.0) -> None:
        _check_floor(self, floor)
        if not 0 < through <= 1:
            raise ConfigError(f"CosineDecay: through must be a share, above 0, got {through}")
        self.floor, self.through = floor, through

    def share(self, step: int, steps: int) -> float:
        """Returns the share of the rate after ``step`` of ``steps`` steps, which is 1 before the first step."""
        return _half_wave(self.through * min(step, steps) / steps, self.floor)


class CosineRestarts(Schedule):
    """Half cosine waves from the rate down to a floor, one after the other, that fill the fit; each starts at the rate.

    Args:
        periods: number of waves.
        growth: how many times as long as the one before a wave is.
        floor: share of the rate at each wave's end.

    Raises:
        ConfigError: there is no wave, growth is not positive, or the floor is no share below 1.

    Reference: SGDR (Loshchilov and Hutter, 2017), https://arxiv.org/abs/1608.03983.
    """

    def __init__(self, periods: int = 2, growth: float = 2.0, floor: float = 0.0) -> None:
        _check_floor(self, floor)
        if periods < 1 or not 0 < growth < math.inf:
            raise ConfigError(f"CosineRestarts: periods and growth must be positive, got {periods} and {growth}")
        self.periods, self.growth, self.floor = periods, growth, floor

    def share(self, step: int, steps: int) -> float:
        """Returns the share of the rate after ``step`` steps: 1 where a wave starts, the floor after the last step."""
        if step >= steps:
            return self.floor
        lengths = [self.growth**number for number in range(self.periods)]
        ends = [round(steps * sum(lengths[: number + 1]) / sum(lengths)) for number in range(self.periods)]
        starts = [0, *ends[:-1]]
        start, end = next((start, end) for start, end in zip(starts, ends, strict=True) if step < end)
        return _half_wave((step - start) / (end - start), self.floor)


class FollowedSchedule(LambdaLR):
    """A schedule followed over a fit of known length; of a checkpoint it takes the step alone, so that the length may change.

    Args:
        optimizer: whose rates are the schedule's whole.
        schedule: to follow.
        steps: of the fit.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule, steps: int) -> None:
        super().__init__(optimizer, lambda step: schedule.share(step, steps))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the checkpoint's step, at the rate that this schedule has there."""
        super().load_state_dict(state_dict)
        shares = zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True)
        for group, rate, share in shares:
            group["lr"] = rate * share(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def scheduled(optimizer: Optimizer, schedule: Schedule | Scheduler, steps: int, setting: str) -> LRScheduler:
    """Returns the schedule of an optimiser at its rate, or refuses it.

    Args:
        optimizer: at the rate that the fit begins with.
        schedule: one of ours, or what makes one of torch's.
        steps: of the fit.
        setting: what it is called: ``model.search.schedule``.

    Raises:
        ConfigError: it cannot be what it says in a fit of this length at this rate.
    """
    if isinstance(schedule, Schedule):
        return FollowedSchedule(optimizer, schedule, steps)
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        scheduler = schedule(optimizer)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{setting}: {error}") from error
    _refuse_misfit(scheduler, min(rates), steps, setting)
    return scheduler


def check_schedule(
    optimizer: Callable[[list[nn.Parameter]], Optimizer],
    rate: float,
    schedule: Schedule | Scheduler | None,
    steps: int,
    setting: str,
) -> None:
    """Checks whether a schedule fits the length and rate of a fit, before there is anything to learn.

    Args:
        optimizer: makes the optimiser.
        rate: that it begins with.
        schedule: None where the rate is constant.
        steps: of the fit.
        setting: what the schedule is called.

    Raises:
        ConfigError: it cannot.
    """
    if schedule is not None and not isinstance(schedule, Schedule):  # ours go with every length and rate
        toy = optimizer([nn.Parameter(torch.zeros(1))])
        for group in toy.param_groups:
            group["lr"] = rate
        scheduled(toy, schedule, steps, setting)


def _refuse_misfit(scheduler: LRScheduler, rate: float, steps: int, setting: str) -> None:
    """Refuses a schedule of torch's whose numbers do not go with the fit's; its attributes hold these numbers."""
    kind, own = type(scheduler).__name__, vars(scheduler)
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError(f"{setting}: ReduceLROnPlateau needs a validation loss, which a merge does not have")
    if steps == 1:  # such as a dry run's: there is one rate
        return
    told = f"in a fit of {steps} steps at a rate of {rate:g}"
    todo = f"leave its numbers to the fit: {setting}=adamerge.CosineDecay, or adamerge.CosineRestarts"
    floor = own.get("eta_min", 0.0)
    if floor >= rate and rate > 0:
        what = f"{setting}: {kind} with eta_min={floor:g} would not fall, {told}"
        raise ConfigError(what, expected=f"eta_min below {rate:g}", got=floor, todo=todo)
    for key in ("T_max", "total_steps"):  # shorter, a cosine would rise again and a cycle end with an error
        if own.get(key) not in {None, steps}:
            what = f"{setting}: {kind} with {key}={own[key]} would not end where it says, {told}"
            raise ConfigError(what, expected=f"{key}={steps}, which is trainer.max_steps", got=own[key], todo=todo)
    for key in ("T_0", "total_iters", "step_size"):
        if own.get(key, 0) > steps:
            what = f"{setting}: {kind} with {key}={own[key]} would not come to its end, {told}"
            raise ConfigError(what, expected=f"{key} of at most {steps}", got=own[key], todo=todo)
    late = [step for step in own.get("milestones", ()) if step >= steps]
    if late:
        what = f"{setting}: {kind} never comes to its milestone {late[0]}, {told}"
        raise ConfigError(what, expected=f"milestones below {steps}", got=late, todo=todo)


def _half_wave(part: float, floor: float) -> float:
    return floor + (1 - floor) * (1 + math.cos(math.pi * part)) / 2


def _check_floor(schedule: Schedule, floor: float) -> None:
    if not 0 <= floor < 1:
        raise ConfigError(
            f"{type(schedule).__name__}: floor is a share of the rate", expected="at least 0 and below 1", got=floor
        )
