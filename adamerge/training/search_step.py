"""Search step: the operations that a search's step is made of, from a merge to the move that Lightning counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adamerge.backbones import Batch
from adamerge.merging.merged_model import MergedModel
from adamerge.objectives.penalties import Penalty
from adamerge.precision import exact
from adamerge.training.nonfinite_guard import Guard
from adamerge.training.objective_gradient import BatchObjective, Evaluation

if TYPE_CHECKING:
    from lightning import LightningModule


class SearchStep:
    """The operations that a search can use in one step.

    Args:
        module: that is trained; it logs, and has the optimisers.
        merged: the merged model.
        objective: of a batch of every task.
        guard: of the optimisers' steps.
        penalty: on the coefficients; none when None.

    Attributes:
        number: of this step, from 0; a search derives the numbers of its random draws from it.
        evaluation: what ``record`` was given.
    """

    def __init__(
        self,
        module: LightningModule,
        merged: MergedModel,
        objective: BatchObjective,
        guard: Guard,
        penalty: Penalty | None = None,
    ) -> None:
        self.number: int = module.global_step
        self.evaluation = Evaluation({}, {})
        self._module, self._merged, self._objective, self._guard = module, merged, objective, guard
        self._penalty = penalty

    def merge(self, draw: int, parameters: Sequence[nn.Parameter] | None = None, gradient: bool = True) -> None:
        """Merges for the current coefficients.

        Args:
            draw: number of the merge, for parametrizations that are random there.
            parameters: whose gradient is wanted; all that are trained when None.
            gradient: False where no gradient is asked for: then nothing is remembered for it.
        """
        with torch.set_grad_enabled(gradient and torch.is_grad_enabled()):
            self._merged.merge(draw, parameters)

    def evaluate(self, batch: Mapping[str, Batch]) -> Evaluation:
        """Evaluates the objective on a batch of every task, with the weights of the last merge and without a gradient."""
        return self._objective.evaluate(batch)

    def backward(self, batch: Mapping[str, Batch]) -> Evaluation:
        """Evaluates the objective on a batch of every task, and sends its gradient back to the merged weights."""
        return self._objective.backward(batch)

    def pull_back(self, evaluation: Evaluation) -> Tensor:
        """Returns the evaluation's total as a scalar whose gradient is that of the coefficients of the last merge."""
        return self._merged.pull_back(evaluation.total)

    def gradients(self, evaluation: Evaluation, parameters: Sequence[nn.Parameter]) -> None:
        """Gives parameters the gradients of what was sent back, averaged over the processes."""
        # not backward(): two of them in a step would leave the processes' gradients different
        gradients = torch.autograd.grad(self.pull_back(evaluation), list(parameters))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            reduced = self._module.trainer.strategy.reduce(gradient, reduce_op="mean")
            parameter.grad = reduced if isinstance(reduced, Tensor) else gradient

    def penalty(self) -> Tensor | None:
        """Returns the penalty of the current coefficients, differentiable in them, and logs it; None without one."""
        if self._penalty is None:
            return None
        with exact(self._merged.device):
            penalty = self._penalty(self._merged.parametrization)
        self.log("train/penalty", penalty.detach())
        return penalty

    def move(self, number: int) -> None:
        """Lets the optimiser of this number move its parameters within the step: Lightning does not count it."""
        optimizer = self.optimizers[number]
        self._guard.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()

    def count(self) -> None:
        """Lets the last optimiser move its parameters, and all schedules go on: the move that Lightning counts."""
        optimizer = self._wrappers[-1]
        optimizer.step()  # Lightning calls on_before_optimizer_step, and with it the guard
        optimizer.zero_grad()
        schedulers: Any = self._module.lr_schedulers()  # one, several or none
        for scheduler in schedulers if isinstance(schedulers, list) else [schedulers] if schedulers is not None else []:
            scheduler.step()

    def log(self, name: str, value: Tensor) -> None:
        """Logs a figure of the step."""
        self._module.log(name, value)

    def record(self, evaluation: Evaluation, total: Tensor) -> None:
        """Logs what the step has come to, and keeps it for the guards; the figures are of all processes' samples.

        Args:
            evaluation: that the step is judged by.
            total: what is minimised.
        """
        self.evaluation = evaluation
        module = self._module
        # where the loss is on a device, a progress bar would wait for it at every step
        module.log("train/loss", total.detach(), prog_bar=module.device.type == "cpu")
        module.log_dict({f"train/loss/{task}": loss for task, loss in evaluation.losses.items()})
        spreads = evaluation.spread.items()
        module.log_dict({f"train/marginal_entropy/{task}": spread.marginal_entropy() for task, spread in spreads})
        module.log_dict({f"train/top_class_share/{task}": spread.top_class_share() for task, spread in spreads})

    @property
    def optimizers(self) -> list[Optimizer]:
        """Returns the optimisers that the search has made, in its order."""
        return [wrapper.optimizer for wrapper in self._wrappers]

    @property
    def _wrappers(self) -> list[Any]:
        """Returns Lightning's wrappers of the optimisers, in the search's order."""
        optimizers: Any = self._module.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]
