"""Descent: all coefficients follow the objective's gradient together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adamerge.backbones import Batch
from adamerge.training.learning_rate import OptimizerCallable, PacedOptimizer
from adamerge.training.schedules import Schedule, Scheduler
from adamerge.training.search import Learner, Search

if TYPE_CHECKING:
    from adamerge.training.search_step import SearchStep


class Descent(Search):
    """Minimises ``sum over tasks of weighted means of the objective + penalty`` over the coefficients.

    Each step merges once, runs every task's batch (jointly, or in micro-batches), and contracts the accumulated gradient
    with the task vectors once, however many tasks there are.

    Args:
        optimizer: of the coefficients.
        lr: learning rate, of every parameter group.
        schedule: of the learning rate: ``CosineDecay`` and its like take their length from the fit, torch's schedulers have
            one of their own and are stepped once per optimiser step; constant when None.

    Raises:
        ConfigError: the rate is not positive; in use: the schedule does not go with the fit.

    Reference: AdaMerging (Yang et al., 2024), https://arxiv.org/abs/2310.02575.
    """

    def __init__(
        self,
        optimizer: OptimizerCallable = Adam,
        lr: float = 1e-3,
        schedule: Schedule | Scheduler | None = None,
    ) -> None:
        self.optimizer, self.lr, self.schedule = optimizer, lr, schedule
        self._paced = PacedOptimizer(optimizer, lr, schedule)
        self._parameters: list[nn.Parameter] = []

    def begin(self, merged: Learner) -> None:
        """Takes all parameters that are not frozen as those to be learned."""
        self._parameters = merged.trained()

    def check(self, steps: int, batch_size: int, processes: int = 1) -> None:
        """Refuses a schedule that does not fit so many steps at this learning rate."""
        self._paced.check(steps)

    def optimizers(self, steps: int) -> list[tuple[Optimizer, LRScheduler | None]]:
        """Makes the optimiser of all coefficients."""
        return [self._paced.of(self._parameters, steps)]

    def step(self, step: SearchStep, batch: Mapping[str, Batch]) -> Tensor:
        """Merges once, evaluates the objective and its gradient, and returns one scalar for the coefficients."""
        step.merge(step.number)
        evaluation = step.backward(batch)
        total = step.pull_back(evaluation)
        penalty = step.penalty()
        if penalty is not None:
            total = total + penalty
        step.record(evaluation, total)
        return total
