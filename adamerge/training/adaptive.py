"""Adaptive merging: all coefficients descend the objective's gradient together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import Adam, Optimizer

from adamerge.backbones import Backbone, Batch
from adamerge.errors import ConfigError
from adamerge.merging.block_execution import Passes
from adamerge.merging.copies import Copy
from adamerge.objectives import Objective
from adamerge.objectives.penalties import Penalty
from adamerge.parametrizations import ParametrizationFactory
from adamerge.precision import exact
from adamerge.task_vectors.storage import Storage
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.base import MergingModule
from adamerge.training.learning_rate import paced
from adamerge.training.schedules import Schedule, Scheduler, check_schedule, scheduled
from adamerge.training.teacher_cache import TeacherCache


class AdaptiveMerging(MergingModule):
    """Minimises ``sum over tasks of weighted means of the objective + penalty`` over the coefficients.

    Each step merges once, runs every task's batch (jointly, or in micro-batches), and contracts the accumulated gradient
    with the task vectors once, however many tasks there are.

    Args:
        backbone: the network.
        task_vectors: base and experts.
        parametrization: which elements share a coefficient.
        objective: what drives the coefficients; None keeps the initial ones and opens no data.
        lr: learning rate, of every parameter group.
        optimizer: of the coefficients.
        penalty: on the coefficients.
        task_weights: weight of a task's mean in the sum; 1 where a task is not named.
        micro_batch: samples per forward pass, of whatever task; all of the step's samples at once when None.
        storage: where the deltas are between merges, and in how many bits; the fastest exact one that fits when None.
        copy: whether the merged copy exists at once, block by block, or in parts over processes; at once when None.
        passes: how the network's blocks run, checkpointed or compiled; as they are when None.
        init_from: a coefficient file of the same groups and experts to start from.
        teachers: where outputs of the experts are kept, for objectives that align with them; in memory when None.
        lr_scheduler: of the learning rate: ``CosineDecay`` and its like take their length from the fit, torch's schedulers
            have one of their own and are stepped once per optimiser step; constant when None.
        recalibrate_buffers: after the fit, recompute the running statistics of batch normalisation on calibration inputs and
            keep them with the coefficients; the base's when False. During the fit they are the base's in any case.
        hold: keep coefficients where they begin whose gradient is nothing but rounding, or that weigh nothing.

    Raises:
        ConfigError: a number is out of range.
        CheckpointError: base, experts and backbone do not fit together.
        CoefficientsError: ``init_from`` does not fit.
        DivergedError: during the fit: a loss or gradient became non-finite.

    Reference: AdaMerging (Yang et al., 2024), https://arxiv.org/abs/2310.02575.
    """

    def __init__(
        self,
        backbone: Backbone,
        task_vectors: TaskVectors,
        parametrization: ParametrizationFactory,
        objective: Objective | None = None,
        lr: float = 1e-3,
        optimizer: OptimizerCallable = Adam,
        penalty: Penalty | None = None,
        task_weights: dict[str, float] | None = None,
        micro_batch: int | None = None,
        storage: Storage | None = None,
        copy: Copy | None = None,
        passes: Passes | None = None,
        init_from: str | Path | None = None,
        teachers: TeacherCache | None = None,
        lr_scheduler: Schedule | Scheduler | None = None,
        recalibrate_buffers: bool = False,
        hold: bool = True,
    ) -> None:
        if not 0 < lr < float("inf"):
            raise ConfigError(f"model.lr must be positive, got {lr}")
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
        self.lr, self.optimizer, self.penalty, self.lr_scheduler = lr, optimizer, penalty, lr_scheduler

    def configure_optimizers(self) -> Any:
        """The optimiser, with the constraint's projection and the guard hooked to its steps; and the schedule."""
        made = paced(self.optimizer(self.merged.trained()), self.lr, "model.lr", "model.optimizer")
        optimizer = self.guard.watch(made)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = scheduled(optimizer, self.lr_scheduler, self.trainer.max_steps, "model.lr_scheduler")
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def check_rates(self, steps: int) -> None:
        """See whether the schedule can be what it says in a fit of so many steps, at this rate."""
        check_schedule(self.optimizer, self.lr, self.lr_scheduler, steps, "model.lr_scheduler")

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> Tensor:
        """One merge, one backward pass per micro-batch into the merged copy, one scalar for the coefficients."""
        self.merged.merge(draw=self.global_step)
        run = self.backward_pass()
        losses = run(batch)
        total = self.merged.pull_back(torch.stack(list(losses.values())).sum())
        if self.penalty is not None:
            with exact(self.device):
                penalty = self.penalty(self.merged.parametrization)
            self.log("train/penalty", penalty.detach())
            total = total + penalty
        self.record(losses, run.spread, total)
        return total

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """A gradient that is not finite must not move anything."""
        self.guard.before_step(optimizer)
