"""Adaptive merging: all coefficients descend the objective's gradient together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from adamerge.backbones import Backbone, Batch
from adamerge.data import Calibration
from adamerge.errors import ConfigError, DivergedError
from adamerge.evaluation import Spread
from adamerge.modules.base import MergingModule
from adamerge.modules.teachers import TeacherCache
from adamerge.objectives import Objective
from adamerge.parametrizations import ParametrizationFactory
from adamerge.penalties import Penalty
from adamerge.task_vectors import TaskVectors


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
        resident: hold the deltas in memory, or read them from disk at each step.
        init_from: a coefficient file of the same groups and experts to start from.
        teachers: where outputs of the experts are kept, for objectives that align with them; in memory when None.
        lr_scheduler: of the learning rate, stepped once per optimiser step; constant when None.

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
        resident: bool = True,
        init_from: str | Path | None = None,
        teachers: TeacherCache | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        if not 0 < lr < float("inf"):
            raise ConfigError(f"model.lr must be positive, got {lr}")
        super().__init__(
            backbone, task_vectors, parametrization, objective, task_weights, micro_batch, resident, init_from, teachers
        )
        self.lr, self.optimizer, self.penalty, self.lr_scheduler = lr, optimizer, penalty, lr_scheduler
        self._bad: Tensor | None = None
        self._flag: Tensor | None = None  # its copy on the host
        self._flag_copied: torch.cuda.Event | None = None
        self.spread: dict[str, Spread] = {}
        self._losses: dict[str, Tensor] = {}
        self._before: list[Tensor] = []

    def configure_optimizers(self) -> Any:
        """The optimiser, with the constraint's projection and the guard hooked to its steps; and the schedule."""
        optimizer = self.optimizer(self.merged.parametrization.parameters())
        for group in optimizer.param_groups:
            group["lr"] = self.lr
        optimizer.register_step_post_hook(self._settle)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ConfigError(
                "model.lr_scheduler: ReduceLROnPlateau needs a validation loss, which a merge does not have"
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def check(self, data: Calibration, precision: str) -> None:
        """As for every module; and nothing shortens the fit."""
        super().check(data, precision)
        trainer = self._trainer
        if trainer is not None and trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                "trainer.accumulate_grad_batches would shorten the fit: a step takes its whole batch",
                expected=1,
                got=trainer.accumulate_grad_batches,
                todo="set model.micro_batch to save memory",
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Stop when the step before was not finite: its update was undone, so the last good coefficients stand."""
        # polled: on a GPU the flag may come a step or two late, and nobody waits for it; the update was zeroed meanwhile
        if self._flag_copied is None or self._flag_copied.query():
            self._stop_if_not_finite()

    def on_fit_start(self) -> None:
        """As for every module; and nothing of an earlier fit counts."""
        super().on_fit_start()
        self._bad, self._flag, self._flag_copied, self._losses = None, None, None, {}

    def on_train_epoch_end(self) -> None:
        """The last step has no next batch."""
        if self._flag_copied is not None:
            self._flag_copied.synchronize()
        self._stop_if_not_finite()

    def _stop_if_not_finite(self) -> None:
        if self._flag is not None and bool(self._flag):
            losses = {task: float(loss) for task, loss in self._losses.items()}
            guilty = [task for task, loss in losses.items() if not torch.isfinite(torch.tensor(loss))]
            raise DivergedError(
                f"step {self.global_step}: the {'loss' if guilty else 'gradient'} is not finite"
                + (f" for task '{guilty[0]}'" if guilty else ""),
                expected="finite numbers",
                got=f"losses {losses}",
                todo="lower model.lr, or look at the samples of that step; the last good coefficients were kept",
            )

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> Tensor:
        """One merge, one backward pass per micro-batch into the merged copy, one scalar for the coefficients."""
        self.merged.merge()
        run = self.backward_pass()
        losses = self._losses = run(batch)
        self.spread = run.spread
        total = self.merged.pull_back(torch.stack(list(losses.values())).sum())
        if self.penalty is not None:
            with torch.autocast(self.device.type, enabled=False):
                penalty = self.penalty(self.merged.parametrization)
            self.log("train/penalty", penalty.detach())
            total = total + penalty
        self._log_step(losses, total)
        return total

    def _log_step(self, losses: dict[str, Tensor], total: Tensor) -> None:
        self.log("train/loss", total.detach(), prog_bar=True)
        self.log_dict({f"train/loss/{task}": loss for task, loss in losses.items()})
        self.log_dict(
            {f"train/marginal_entropy/{task}": found.marginal_entropy() for task, found in self.spread.items()}
        )
        self.log_dict({f"train/top_class_share/{task}": found.top_class_share() for task, found in self.spread.items()})

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """If a gradient is not finite, remember it on the device and let the gradient be zero."""
        parameters = list(self.merged.parametrization.parameters())
        gradients = [p.grad for p in parameters if p.grad is not None]
        # the gradients are those of all processes; a loss that is not finite has made them so
        finite = torch.stack([torch.isfinite(gradient).all() for gradient in gradients]).all()
        bad = ~finite if self._bad is None else self._bad | ~finite
        self._bad = self._flag = bad
        if bad.is_cuda:
            self._flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(bad, non_blocking=True)
            self._flag_copied = torch.cuda.Event()
            self._flag_copied.record()
        self._before = [p.detach().clone() for p in parameters]
        for gradient in gradients:
            gradient.copy_(torch.where(bad, 0.0, gradient))

    def _settle(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """After a step: project, and undo the step if it was not finite."""
        with torch.no_grad():
            self.merged.parametrization.project_()
            for parameter, before in zip(self.merged.parametrization.parameters(), self._before, strict=True):
                parameter.copy_(torch.where(self._bad, before, parameter))  # type: ignore[arg-type]
        self._before = []
