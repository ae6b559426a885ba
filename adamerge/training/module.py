"""The Lightning module: a merged model whose only parameters are the coefficients, moved by a search."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from adamerge.artifacts.coefficients import Coefficients, load_values
from adamerge.backbones import Batch
from adamerge.data import Calibration
from adamerge.errors import ConfigError
from adamerge.io.unwritten import is_unwritten
from adamerge.merging.merged_model import MergedModel
from adamerge.parametrizations.held_names import held_names
from adamerge.training.batchnorm import check_normalised
from adamerge.training.fit_checks import check_processes, check_same_models, planned, preflight
from adamerge.training.held_coefficients import Held
from adamerge.training.held_out import HeldOut
from adamerge.training.merging import Merging
from adamerge.training.method_checks import FitSettings
from adamerge.training.nonfinite_guard import Guard
from adamerge.training.objective_gradient import BatchObjective, Evaluation
from adamerge.training.result import Result
from adamerge.training.search_step import SearchStep
from adamerge.training.split_scores import SplitScores
from adamerge.training.step_batches import StepBatches
from adamerge.training.task_balance import TaskBalance

DECIDED = ("search", "teachers", "balance", "held_out", "result")
"""Attributes of a module whose state is in its checkpoints, beside the parameters."""


class MergingModule(LightningModule):
    """A merged model under Lightning; its only parameters are the coefficients.

    Args:
        merging: what is merged, how, and what drives it.

    Attributes:
        evaluation: of the last step; empty before the first one.
        held_out: looks at inputs that no step sees.
        result: what the fit ends with.

    Raises:
        ConfigError: the search has nothing to learn, or there are no running statistics to recalibrate.
        CheckpointError: base, experts and backbone do not fit together.
        CoefficientsError: ``init_from`` does not fit.
        DivergedError: during the fit: a loss or gradient became non-finite.
    """

    def __init__(self, merging: Merging) -> None:
        backbone, task_vectors = merging.backbone, merging.task_vectors
        if merging.recalibrate_buffers:
            check_normalised(backbone)
        super().__init__()
        self.merging = merging
        parametrization, storage = merging.parametrization(task_vectors), merging.storage
        self.merged = MergedModel(
            backbone, task_vectors, parametrization, storage, copy=merging.copy, passes=merging.passes
        )
        self.objective = merging.objective  # a submodule: its buffers are in the checkpoints
        self.teachers = merging.teaching()
        self.balance = TaskBalance(merging.task_weights, merging.balance)
        self.batches = StepBatches(self.merged, merging.objective, merging.views, merging.micro_batch)
        if merging.init_from is not None and not is_unwritten(merging.init_from):
            load_values(Path(merging.init_from), self.merged.parametrization, task_vectors.experts)
        self.guard = Guard(self.merged.parametrization.project_)
        self.held = Held(self.merged, self.guard, merging.hold)
        self.held_out = HeldOut(self.merged, merging.micro_batch)
        self.result = Result(self.merged, merging.recalibrate_buffers)
        self.evaluation = Evaluation({}, {})
        self.search = copy.copy(merging.search)
        self.search.begin(self.merged)
        self.automatic_optimization = self.search.automatic
        self._passed: Calibration | None = None  # data of a preflight that no fit has followed yet
        self._scores = SplitScores(self.merged)

    @property
    def data(self) -> Calibration:
        """Returns the calibration data of the trainer.

        Raises:
            ConfigError: they are no calibration data.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, Calibration):
            kind = type(data).__name__
            raise ConfigError("no calibration data: pass a Calibration data module to the trainer", got=kind)
        return data

    def preflight(self, data: Calibration, fit: FitSettings) -> None:
        """Checks everything that is known of a fit before it begins; the next fit on these data does not check again.

        Raises:
            ConfigError: the parts do not go together.
            DataError: the data cannot be read.
        """
        preflight(self.merged, self.merging, data, fit)
        self._passed = data

    def setup(self, stage: str) -> None:
        """Checks the model against its data, and makes the heads from the base's weights."""
        data, strategy = self.data, self.trainer.strategy
        # each process chooses by the memory it sees, and all must compute the same bits: the first one's choice is all's
        self.merged.choose_storage(strategy.broadcast(planned(self.merged, self.trainer).chosen))
        if self.merged.copy.collective:
            self.to(strategy.root_device)  # it is sharded where it will be, and the trainer moves modules later
        check_same_models(self.merged.task_vectors)
        if stage == "fit":
            self.held_out.begin()
            self.result.begin()
            if self._passed is not data:
                self.preflight(data, FitSettings.of(self.trainer))
            self._passed = None
            check_processes(self.merged, self.search, self.merging.micro_batch, data.batch_size, self.trainer)
            if self.objective is not None:
                self.objective.begin(data.course())
        self.merged.fill(self.merged.task_vectors.base.__getitem__)
        self.merged.backbone.build_heads(data.tasks, self.merged.task_vectors.checkpoints)

    def configure_optimizers(self) -> Any:
        """Returns the search's optimisers, with the constraint's projection and the guard hooked to their steps."""
        made = self.search.optimizers(self.trainer.max_steps)
        optimizers = [self.guard.watch(optimizer) for optimizer, _ in made]
        schedulers = [scheduler for _, scheduler in made if scheduler is not None]
        if not self.search.automatic:
            return optimizers, schedulers
        return optimizers, [{"scheduler": scheduler, "interval": "step"} for scheduler in schedulers]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves what is decided once for a run, such as which coefficients are held, and the search's state."""
        checkpoint["held"] = self.held.state(self.named_parameters())
        checkpoint |= {name: getattr(self, name).state_dict() for name in DECIDED}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores what a run has decided and the search's state; a run that held no coefficients goes on so."""
        self.held.load(checkpoint.get("held", {}), self.named_parameters())
        for name in DECIDED:
            if name in checkpoint:  # earlier versions wrote fewer
                getattr(self, name).load_state_dict(checkpoint[name])

    def on_fit_start(self) -> None:
        """Gets a taught objective's experts ready, before the loader's workers start, and decides what is held."""
        self.guard.forget()
        self.evaluation = Evaluation({}, {})
        self.trainer.should_stop |= bool(self.result.ended)
        self.batches.begin(self.teachers, self.data, self.trainer)
        self.balance.begin(self._first_losses, self.device)
        run = None
        if self.objective is not None and self.search.uses_gradients and self.held.open:
            batch = self.search.first_batch(self.batches.first(self.data, self.device))
            run = partial(self._batch_objective(self.balance.of()).backward, batch)
        self.held.begin(run, self.device, self.trainer.strategy)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Stops when the step before was not finite: its update was undone, so the last good coefficients stand."""
        self.guard.poll(self.global_step, self.evaluation.losses)

    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> Tensor | None:
        """Lets the search take one step.

        Raises:
            RuntimeError: a search that moves the coefficients itself has not done so in exactly one step that counts.
        """
        step = SearchStep(self, self.merged, self._batch_objective(self.balance.of()), self.guard, self.merging.penalty)
        total = self.search.step(step, self.batches(batch))
        self.evaluation = step.evaluation
        if not self.search.automatic and self.global_step != step.number + 1:
            kind, moves = type(self.search).__name__, self.global_step - step.number
            raise RuntimeError(f"{kind}.step must call SearchStep.count once, and did so {moves} times")
        return total

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Keeps a gradient that is not finite from moving anything."""
        self.guard.before_step(optimizer)

    def on_train_epoch_end(self) -> None:
        """Stops when the last step was not finite: it has no next batch."""
        self.guard.wait(self.global_step, self.evaluation.losses)

    def on_fit_end(self) -> None:
        """Settles the result, also where no callback asks for it."""
        self.finish()

    def finish(self) -> None:
        """Settles what the fit has come to: a step is chosen, and its buffers recomputed; once, whoever asks first."""
        self.result.choose(self.trainer)
        self.result.recalibrate(self.data, self.trainer.strategy)

    def coefficients(self) -> Coefficients:
        """Returns the current coefficients with everything that gives them meaning."""
        merged, choice = self.merged, self.result.choice
        protocol: dict[str, Any] = {}
        if self._trainer is not None and self.objective is not None:
            protocol = self.data.protocol | ({"selection": choice} if choice else {})
        protocol |= self.result.recalibration | held_names(merged.parametrization.held, merged.task_vectors.experts)
        last = self.global_step if self._trainer is not None else 0
        step = last if choice.get("step") is None else choice["step"]
        return Coefficients(
            merged.task_vectors.to("cpu"),
            merged.parametrization,
            layout=merged.backbone.layout(),
            dtype=merged.dtype,
            step=step,
            protocol=protocol,
            buffers=merged.recalibrated,
        )

    def on_validation_epoch_start(self) -> None:
        """Merges once for the current coefficients, before all tasks are validated."""
        self._scores.begin(self.data, "validation")

    def on_test_epoch_start(self) -> None:
        """Merges once for the current coefficients, before all tasks are tested."""
        self._scores.begin(self.data, "test")

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Scores a batch of the validation split."""
        self._scores.update(batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Scores a batch of the test split."""
        self._scores.update(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs the validation score per task and on average."""
        self._scores.log(self)

    def on_test_epoch_end(self) -> None:
        """Logs the test score per task and on average."""
        self._scores.log(self)

    def _batch_objective(self, weights: Mapping[str, float | Tensor]) -> BatchObjective:
        assert self.objective is not None
        return BatchObjective(self.merged, self.objective, weights, self.merging.micro_batch, self.trainer.strategy)

    @torch.no_grad()
    def _first_losses(self) -> Mapping[str, Tensor]:
        batch = self.batches.first(self.data, self.device)
        with self.trainer.strategy.precision_plugin.train_step_context():
            self.merged.merge(0)
            return self._batch_objective({}).evaluate(batch).losses
