"""Bilevel search: a mask is learned for coefficients that adapt to it anew, one step each, at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adamerge.backbones import Batch
from adamerge.backbones.inputs import count
from adamerge.errors import ConfigError
from adamerge.training.learning_rate import OptimizerCallable, PacedOptimizer
from adamerge.training.objective_gradient import Evaluation
from adamerge.training.schedules import Schedule, Scheduler
from adamerge.training.search import Learner, Search

if TYPE_CHECKING:
    from adamerge.training.search_step import SearchStep


class Bilevel(Search):
    """The mask descends the objective at coefficients that took one step under it: ``min_x L_B(x, w0 - step L_A(x, w0))``.

    Each step halves every task's batch into A and B. The coefficients are reset to where the fit began, then the model is
    merged under a sample of the mask; on A the inner optimiser moves the coefficients, and their constraint holds; then
    the model is merged again, and on B the outer optimiser moves the mask. First order: the outer gradient does not look
    through the inner step. Both optimisers' states last over the steps.

    Only the outer step is Lightning's to count, so that ``trainer.max_steps``, the order of data, the numbers of the mask's
    samples, checkpoints and metrics all mean steps of this search. What is left of the coefficients at the end is where
    they adapted to the last batch; they are learned in a fit of their own, under the mask that this one learned.

    Args:
        optimizer: of the mask.
        lr: learning rate of the mask.
        schedule: of the mask's learning rate, stepped once per step, as for every search; constant when None.
        inner_optimizer: of the coefficients.
        inner_lr: learning rate of the coefficients' one step; 1 with Adam sends them to where the gradient's sign points.
        inner_schedule: of the coefficients' rate; likewise.
        fresh_noise: see another sample of the mask in the outer merge; False takes that of the inner one again.

    Raises:
        ConfigError: a rate is not positive; in use: the parametrization has no mask, or no coefficients, to learn, a
            schedule does not go with the fit, or a batch has no two halves.

    Reference: Concrete Subspace Learning (Tang et al., 2023), https://arxiv.org/abs/2312.06173, algorithm 1.
    """

    automatic = False
    penalised = False

    def __init__(
        self,
        *,
        optimizer: OptimizerCallable = Adam,
        lr: float = 1e-3,
        schedule: Schedule | Scheduler | None = None,
        inner_optimizer: OptimizerCallable = Adam,
        inner_lr: float = 1.0,
        inner_schedule: Schedule | Scheduler | None = None,
        fresh_noise: bool = True,
    ) -> None:
        self.optimizer, self.lr, self.schedule = optimizer, lr, schedule
        self.inner_optimizer, self.inner_lr, self.inner_schedule = inner_optimizer, inner_lr, inner_schedule
        self.fresh_noise = fresh_noise
        self._outer = PacedOptimizer(optimizer, lr, schedule)
        self._inner = PacedOptimizer(inner_optimizer, inner_lr, inner_schedule, "inner_")
        self._mask: list[nn.Parameter] = []
        self._coefficients: list[nn.Parameter] = []
        self._start: list[Tensor] = []

    def begin(self, merged: Learner) -> None:
        """Takes the mask and the coefficients apart; what each step begins from is where the coefficients are now."""
        made = merged.parametrization
        masks = {id(logits) for logits in made.masks().values()}
        self._mask = [parameter for parameter in merged.trained() if id(parameter) in masks]
        self._coefficients = [parameter for parameter in merged.trained() if id(parameter) not in masks]
        for parameters, what in ((self._mask, "mask"), (self._coefficients, "coefficients")):
            if not parameters:
                raise ConfigError(
                    f"a bilevel search learns coefficients inside and a mask outside, and {type(made).__name__} has no "
                    f"{what} to learn",
                    todo="wrap it: Concrete(inner=...), without mask_from and Frozen; or leave out model.search",
                )
        self._start = [parameter.detach().clone() for parameter in self._coefficients]

    def check(self, steps: int, batch_size: int, processes: int = 1) -> None:
        """Refuses schedules that cannot be what they say, and batches that cannot be halved."""
        self._inner.check(steps)
        self._outer.check(steps)
        if batch_size < 2 * processes:
            raise ConfigError(
                "data.batch_size: a bilevel search halves each task's samples of a step",
                expected=f"at least {2 * processes}",
                got=batch_size,
            )

    def optimizers(self, steps: int) -> list[tuple[Optimizer, LRScheduler | None]]:
        """Makes the optimiser of the coefficients, then that of the mask, whose steps Lightning counts."""
        starts = zip(self._start, self._coefficients, strict=True)
        self._start = [start.to(parameter.device) for start, parameter in starts]
        return [self._inner.of(self._coefficients, steps), self._outer.of(self._mask, steps)]

    def first_batch(self, batch: Mapping[str, Batch]) -> dict[str, Batch]:
        """Returns the half A of the batch, on which the coefficients take their one step."""
        return {task: part.rows(slice(count(part.inputs) // 2)) for task, part in batch.items()}

    def step(self, step: SearchStep, batch: Mapping[str, Batch]) -> None:
        """Resets the coefficients; merges, and moves them on half A; merges again, and moves the mask on half B."""
        inner = self.first_batch(batch)
        outer = {task: part.rows(slice(count(inner[task].inputs), None)) for task, part in batch.items()}
        draw = 2 * step.number
        with torch.no_grad():
            for parameter, start in zip(self._coefficients, self._start, strict=True):
                parameter.copy_(start)
        evaluation = self._gradients(step, inner, draw, self._coefficients)
        step.log("train/inner_loss", evaluation.total)
        step.move(0)
        evaluation = self._gradients(step, outer, draw + self.fresh_noise, self._mask)
        step.count()
        step.record(evaluation, evaluation.total)

    def _gradients(
        self, step: SearchStep, batch: Mapping[str, Batch], draw: int, parameters: Sequence[nn.Parameter]
    ) -> Evaluation:
        """Merges and evaluates once, and gives these parameters, and no others, their gradients."""
        step.merge(draw, parameters)
        evaluation = step.backward(batch)
        step.gradients(evaluation, parameters)
        return evaluation
