"""Bilevel merging: a mask is learned for coefficients that adapt to it anew, one step each, at every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from adamerge.backbones import Backbone, Batch
from adamerge.backbones.inputs import count
from adamerge.data import Calibration
from adamerge.errors import ConfigError
from adamerge.merging.block_execution import Passes
from adamerge.merging.copies import Copy
from adamerge.objectives import Objective
from adamerge.parametrizations import ParametrizationFactory
from adamerge.task_vectors.storage import Storage
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.base import MergingModule
from adamerge.training.learning_rate import paced
from adamerge.training.objective_gradient import BackwardPass
from adamerge.training.schedules import Schedule, Scheduler, check_schedule, scheduled
from adamerge.training.teacher_cache import TeacherCache


class BilevelMerging(MergingModule):
    """The mask descends the objective at coefficients that took one step under it: ``min_x L_B(x, w0 - step L_A(x, w0))``.

    Each step halves every task's batch into A and B. The coefficients are reset to where the fit began, then the model is
    merged under a sample of the mask; on A the inner optimiser moves the coefficients, and their constraint holds; then
    the model is merged again, and on B the outer optimiser moves the mask. First order: the outer gradient does not look
    through the inner step. Both optimisers' states last over the steps.

    Only the outer step is Lightning's to count, so that ``trainer.max_steps``, the order of data, the numbers of the mask's
    samples, checkpoints and metrics all mean steps of this search. What is left of the coefficients at the end is where
    they adapted to the last batch; they are learned in a fit of their own, under the mask that this one found.

    Args:
        backbone: the network.
        task_vectors: base and experts.
        parametrization: coefficients and a mask, such as ``Concrete``.
        objective: what drives both; None keeps the initial ones and opens no data.
        lr: learning rate of the mask.
        inner_lr: learning rate of the coefficients' one step; 1 with Adam sends them to where the gradient's sign points.
        optimizer: of the mask.
        inner_optimizer: of the coefficients.
        fresh_noise: see another sample of the mask in the outer merge; False takes that of the inner one again.
        task_weights: weight of a task's mean in the sum; 1 where a task is not named.
        micro_batch: samples per forward pass, of whatever task; all of the half step's samples at once when None.
        storage: where the deltas are between merges, and in how many bits; the fastest exact one that fits when None.
        copy: whether the merged copy exists at once, block by block, or in parts over processes; at once when None.
        passes: how the network's blocks run, checkpointed or compiled; as they are when None.
        init_from: a coefficient file of the same groups, mask and experts to start from.
        teachers: where outputs of the experts are kept, for objectives that align with them; in memory when None.
        lr_scheduler: of the mask's learning rate, stepped once per step, as for every search; constant when None.
        inner_lr_scheduler: of the coefficients' rate; likewise.
        recalibrate_buffers: after the fit, recompute the running statistics of batch normalisation on calibration inputs and
            keep them with the coefficients; the base's when False. During the fit they are the base's in any case.
        hold: keep coefficients where they begin whose gradient is nothing but rounding, or that weigh nothing.

    Raises:
        ConfigError: a number is out of range, or the parametrization has no mask, or no coefficients, to learn.
        CheckpointError: base, experts and backbone do not fit together.
        CoefficientsError: ``init_from`` does not fit.
        DivergedError: during the fit: a loss or gradient became non-finite.

    Reference: Concrete Subspace Learning (Tang et al., 2023), https://arxiv.org/abs/2312.06173, algorithm 1.
    """

    def __init__(
        self,
        backbone: Backbone,
        task_vectors: TaskVectors,
        parametrization: ParametrizationFactory,
        objective: Objective | None = None,
        lr: float = 1e-3,
        inner_lr: float = 1.0,
        optimizer: OptimizerCallable = Adam,
        inner_optimizer: OptimizerCallable = Adam,
        fresh_noise: bool = True,
        task_weights: dict[str, float] | None = None,
        micro_batch: int | None = None,
        storage: Storage | None = None,
        copy: Copy | None = None,
        passes: Passes | None = None,
        init_from: str | Path | None = None,
        teachers: TeacherCache | None = None,
        lr_scheduler: Schedule | Scheduler | None = None,
        inner_lr_scheduler: Schedule | Scheduler | None = None,
        recalibrate_buffers: bool = False,
        hold: bool = True,
    ) -> None:
        for name, value in (("lr", lr), ("inner_lr", inner_lr)):
            if not 0 < value < float("inf"):
                raise ConfigError(f"model.{name} must be positive, got {value}")
        super().__init__(
            backbone,
            task_vectors,
            parametrization,
            objective,
            task_weights,
            micro_batch,
            storage,
            copy,
            passes,
            init_from,
            teachers,
            recalibrate_buffers,
            hold,
        )
        self.automatic_optimization = False
        self.lr, self.inner_lr, self.fresh_noise = lr, inner_lr, fresh_noise
        self.lr_scheduler, self.inner_lr_scheduler = lr_scheduler, inner_lr_scheduler
        self.optimizer, self.inner_optimizer = optimizer, inner_optimizer
        made = self.merged.parametrization
        masks = {id(logits) for logits in made.masks().values()}
        self._mask = [parameter for parameter in self.merged.trained() if id(parameter) in masks]
        self._coefficients = [parameter for parameter in self.merged.trained() if id(parameter) not in masks]
        for found, what in ((self._mask, "mask"), (self._coefficients, "coefficients")):
            if not found:
                raise ConfigError(
                    f"a bilevel search learns coefficients inside and a mask outside, and {type(made).__name__} has no "
                    f"{what} to learn",
                    todo="wrap it: Concrete(inner=...), without mask_from and Frozen; or leave out `search`",
                )
        self._start = [parameter.detach().clone() for parameter in self._coefficients]

    def configure_optimizers(self) -> Any:
        """The inner optimiser and the outer one, both guarded."""
        inner = paced(
            self.inner_optimizer(self._coefficients), self.inner_lr, "model.inner_lr", "model.inner_optimizer"
        )
        outer = paced(self.optimizer(self._mask), self.lr, "model.lr", "model.optimizer")
        optimizers = [self.guard.watch(inner), self.guard.watch(outer)]
        wanted = zip(optimizers, self._schedules(), strict=True)
        steps = self.trainer.max_steps
        return optimizers, [
            scheduled(optimizer, schedule, steps, setting) for optimizer, (setting, schedule) in wanted if schedule
        ]

    def check_rates(self, steps: int) -> None:
        """See whether both schedules can be what they say in a fit of so many steps, at their rates."""
        makers, rates = (self.inner_optimizer, self.optimizer), (self.inner_lr, self.lr)
        for maker, rate, (setting, schedule) in zip(makers, rates, self._schedules(), strict=True):
            check_schedule(maker, rate, schedule, steps, setting)

    def _schedules(self) -> list[tuple[str, Schedule | Scheduler | None]]:
        """Name and schedule of the coefficients' rate and of the mask's, in the optimisers' order."""
        return [
            ("model.inner_lr_scheduler", self.inner_lr_scheduler),
            ("model.lr_scheduler", self.lr_scheduler),
        ]

    def on_fit_start(self) -> None:
        """As for every module; and what each step begins from is where the coefficients are by now."""
        super().on_fit_start()
        self._start = [start.to(self.device) for start in self._start]

    def check(self, data: Calibration, precision: str) -> None:
        """As for every module; and a batch has two halves."""
        super().check(data, precision)
        if data.batch_size < 2 * self.processes:
            raise ConfigError(
                "data.batch_size: a bilevel search halves each task's samples of a step",
                expected=f"at least {2 * self.processes}",
                got=data.batch_size,
            )

    def first_batch(self, batch: dict[str, Batch]) -> dict[str, Batch]:
        """The half A."""
        return {task: part.rows(slice(count(part.inputs) // 2)) for task, part in batch.items()}

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> None:
        """Reset; merge, A, coefficients; merge, B, mask."""
        inner = self.first_batch(batch)
        outer = {task: part.rows(slice(count(inner[task].inputs), None)) for task, part in batch.items()}
        draw = 2 * self.global_step
        with torch.no_grad():
            for parameter, start in zip(self._coefficients, self._start, strict=True):
                parameter.copy_(start)
        optimizers: Any = self.optimizers()
        _, losses = self._pull_back(inner, draw, self._coefficients)
        self.log("train/inner_loss", torch.stack(list(losses.values())).sum())
        plain = optimizers[0].optimizer  # whose steps Lightning does not see
        self.guard.before_step(plain)
        plain.step()
        plain.zero_grad()
        run, losses = self._pull_back(outer, draw + self.fresh_noise, self._mask)
        optimizers[1].step()  # the one that counts; it calls on_before_optimizer_step
        optimizers[1].zero_grad()
        found: Any = self.lr_schedulers()  # one, several or none
        for scheduler in found if isinstance(found, list) else [found] if found is not None else []:
            scheduler.step()
        self.record(losses, run.spread, torch.stack(list(losses.values())).sum())

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """A gradient that is not finite must not move anything."""
        self.guard.before_step(optimizer)

    def _pull_back(
        self, batch: Mapping[str, Batch], draw: int, parameters: Sequence[nn.Parameter]
    ) -> tuple[BackwardPass, dict[str, Tensor]]:
        """One merge, one backward pass, one contraction: the gradients of these parameters alone."""
        self.merged.merge(draw, parameters)
        run = self.backward_pass()
        losses = run(batch)
        scalar = self.merged.pull_back(torch.stack(list(losses.values())).sum())
        # not backward(): two of them in a step would leave the processes' gradients different
        gradients = torch.autograd.grad(scalar, list(parameters))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            reduced = self.trainer.strategy.reduce(gradient, reduce_op="mean")
            parameter.grad = reduced if isinstance(reduced, Tensor) else gradient
        return run, losses
