"""Task balance: what each task's loss weighs in the sum, as given or so that all tasks begin with losses of one size."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from adamerge.errors import ConfigError


class EqualAtStart:
    """Weighs each task by ``m / L_t``: L_t is the size of its loss in the fit's first step, m the mean of these.

    So all tasks begin with losses of one size, and their sum with the value that it would have had: no rate need change. No
    labels are asked, for a loss is what the objective makes of the batch. The weights are decided once for a run.

    Args:
        least: the share of m that each L_t counts as at least; a task that begins near its end would weigh without bound.

    Raises:
        ConfigError: it is no share above 0.

    Reference: GradNorm (Chen et al., 2018), https://arxiv.org/abs/1711.02257: losses relative to their initial values, of
    which this is the form without rates of training.
    """

    def __init__(self, least: float = 0.05) -> None:
        if not 0 < least <= 1:
            raise ConfigError(f"EqualAtStart: least must be a share above 0, got {least}")
        self.least = least

    def weights(self, losses: Tensor) -> Tensor:
        """Returns the weight of each task, ``(tasks,)``, from the losses of a first step."""
        sizes = losses.abs()
        mean = sizes.mean()
        return mean / torch.maximum(sizes, self.least * mean).clamp_min(torch.finfo(torch.float32).tiny)


class TaskBalance:
    """The weights of one fit's tasks: those given, times those that its first losses ask for.

    Args:
        given: by task; 1 where a task is not named.
        rule: from first losses; none when None.
    """

    def __init__(self, given: Mapping[str, float] | None, rule: EqualAtStart | None) -> None:
        self._given, self._rule = dict(given or {}), rule
        self._found: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] | None = None

    def begin(self, losses: Callable[[], Mapping[str, Tensor]], device: torch.device) -> None:
        """Decides the weights of a fit, or takes those of the one that is gone on with.

        Args:
            losses: evaluates the first step's losses by task, without weights; called where they are asked for.
            device: of the losses.
        """
        loaded, self._loaded, self._found = self._loaded, None, {}
        if self._rule is None:
            return
        if loaded is not None:
            self._found = {task: weight.to(device) for task, weight in loaded.items()}
            return
        first = losses()
        self._found = dict(zip(first, self._rule.weights(torch.stack([*first.values()])).unbind(), strict=True))

    def of(self) -> dict[str, float | Tensor]:
        """Returns the weight of each task that has one of its own; of those decided in a fit a scalar on its device."""
        tasks = {*self._given, *self._found}
        return {task: self._given.get(task, 1.0) * self._found.get(task, 1.0) for task in tasks}

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the weights that the first losses asked for."""
        return {task: weight.cpu() for task, weight in self._found.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Has the next fit keep a checkpoint's weights."""
        self._loaded = dict(state)
