"""What every search for coefficients shares: the merged model, its heads, evaluation and what is written at the end."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torchmetrics import MeanMetric

from adamerge.artifacts.coefficients import Coefficients, load_values
from adamerge.backbones import Backbone, Batch
from adamerge.data import Calibration
from adamerge.data.loaders import on_device
from adamerge.errors import ConfigError
from adamerge.merging.block_execution import Passes
from adamerge.merging.copies import Copy
from adamerge.merging.merged_model import MergedModel
from adamerge.objectives import Objective
from adamerge.parametrizations import ParametrizationFactory
from adamerge.parametrizations.untrained import held_names
from adamerge.task_vectors.storage import Storage
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.batchnorm import normalisations, recalibrate
from adamerge.training.evaluation import Spread
from adamerge.training.fit_checks import check_fit, check_same_models, check_steps, planned
from adamerge.training.nonfinite_guard import Guard
from adamerge.training.objective_gradient import BackwardPass
from adamerge.training.teacher_cache import TeacherCache
from adamerge.training.untrained import Held


class MergingModule(LightningModule, ABC):
    """A merged model under Lightning; its only parameters are the coefficients.

    Args:
        backbone: the network.
        task_vectors: base and experts.
        parametrization: which elements share a coefficient.
        objective: what drives the coefficients; None keeps the initial ones and opens no data.
        task_weights: weight of a task's mean in the sum; 1 where a task is not named, negative to move away from it.
        micro_batch: samples per forward pass, of whatever task; all of the step's samples at once when None.
        storage: where the deltas are between merges, and in how many bits; the fastest exact one that fits when None.
        copy: whether the merged copy exists at once, block by block, or in parts over processes; at once when None.
        passes: how the network's blocks run, checkpointed or compiled; as they are when None.
        init_from: a coefficient file of the same groups and experts to start from.
        teachers: where outputs of the experts are kept, for objectives that align with them; in memory when None.
        recalibrate_buffers: after the fit, recompute the running statistics of batch normalisation on calibration inputs and
            keep them with the coefficients; the base's when False. During the fit they are the base's in any case.
        hold: keep coefficients where they begin whose gradient is nothing but rounding, or that weigh nothing.

    Raises:
        ConfigError: a number is out of range, or there are no running statistics to recalibrate.
        CheckpointError: base, experts and backbone do not fit together.
        CoefficientsError: ``init_from`` does not fit.
    """

    def __init__(
        self,
        backbone: Backbone,
        task_vectors: TaskVectors,
        parametrization: ParametrizationFactory,
        objective: Objective | None = None,
        task_weights: dict[str, float] | None = None,
        micro_batch: int | None = None,
        storage: Storage | None = None,
        copy: Copy | None = None,
        passes: Passes | None = None,
        init_from: str | Path | None = None,
        teachers: TeacherCache | None = None,
        recalibrate_buffers: bool = False,
        hold: bool = True,
    ) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise ConfigError(f"model.micro_batch must be at least 1, got {micro_batch}")
        if recalibrate_buffers and not normalisations(backbone):
            raise ConfigError(
                f"model.recalibrate_buffers: {type(backbone).__name__} has no running statistics to recompute",
                expected="a network with batch normalisation",
                got=type(backbone.network).__name__,
                todo="leave it out",
            )
        super().__init__()
        self.merged = MergedModel(
            backbone, task_vectors, parametrization(task_vectors), storage, copy=copy, passes=passes
        )
        self.objective = objective
        self.task_weights, self.micro_batch = task_weights or {}, micro_batch
        self.teachers = teachers if teachers is not None else TeacherCache()
        self.recalibrate_buffers = recalibrate_buffers
        self.recalibration: dict[str, Any] = {}  # which data the buffers are of; empty while they are the base's
        self.choice: dict[str, Any] = {}  # which step's coefficients these are, and why; the last step's where empty
        self.guard = Guard(self.merged.parametrization.project_)
        self.held = Held(self.merged, self.guard, hold)
        self.spread: dict[str, Spread] = {}
        self._losses: dict[str, Tensor] = {}
        self._metrics: dict[str, MeanMetric] = {}
        self._evaluated: list[str] = []
        if init_from is not None:
            load_values(Path(init_from), self.merged.parametrization, self.merged.task_vectors.experts)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, as the data module orders them."""
        return tuple(self._data().tasks)

    @property
    def processes(self) -> int:
        """Of the run; one while there is no trainer."""
        return 1 if self._trainer is None else self._trainer.world_size

    def setup(self, stage: str) -> None:
        """Check, and make the heads from the base's weights."""
        data = self._data()
        strategy = self.trainer.strategy
        # each process chooses by the memory it sees, and all must compute the same bits: the first one's choice is all's
        self.merged.choose_storage(strategy.broadcast(planned(self.merged, self.trainer).chosen))
        if self.merged.copy.collective:
            self.to(strategy.root_device)  # it is sharded where it will be, and the trainer moves modules later
        check_same_models(self.merged.task_vectors)
        if stage == "fit":
            self.choice, self.recalibration = {}, {}
            self.merged.replace_buffers({})
            self.check(data, str(self.trainer.precision))
            self.check_data(data)
            if self.objective is not None:
                self.objective.begin(data.course())
        self.merged.fill(self.merged.task_vectors.base.__getitem__)
        self.merged.backbone.build_heads(data.tasks, self.merged.task_vectors.checkpoints)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Which coefficients are held is decided once for a run."""
        checkpoint["held"] = self.held.state(self.named_parameters())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As it was decided; a run of a version that held none goes on so."""
        self.held.load(checkpoint.get("held", {}), self.named_parameters())

    def on_fit_start(self) -> None:
        """Run the experts on the samples of the fit, when the objective is taught: before the loader's workers start.

        Then decide which coefficients are held.
        """
        self.guard.forget()
        self._losses = {}
        data = self._data()
        data.teach(None)
        if self.objective is not None and self.objective.taught:
            steps = data.steps()
            batch_size = self.micro_batch or steps.batch_size
            folder = Path(self.trainer.default_root_dir)
            self.teachers.fill(self.merged, steps, self.objective.hidden, batch_size, self.trainer.strategy, folder)
            data.teach(self.teachers)
        run = None if self.objective is None else partial(self._first_gradient, data)
        self.held.begin(run, self.device, self.trainer.strategy)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Stop when the step before was not finite: its update was undone, so the last good coefficients stand."""
        self.guard.poll(self.global_step, self._losses)

    def on_train_epoch_end(self) -> None:
        """The last step has no next batch."""
        self.guard.wait(self.global_step, self._losses)

    def on_fit_end(self) -> None:
        """What follows a fit, where no callback has asked for it yet."""
        self.finish(self._data(), self.trainer.strategy)

    def finish(self, data: Calibration, strategy: Strategy) -> None:
        """Recompute the buffers for the coefficients that are the result, when that is wanted and not done yet.

        A fit that ends early keeps the base's.

        Args:
            data: that the coefficients were learned on.
            strategy: of the trainer; every process comes here.

        Raises:
            DivergedError: the merged network computes what is not finite.
        """
        if self.recalibrate_buffers and not self.recalibration:
            self.to(strategy.root_device)  # after a fit the trainer has moved all to the CPU
            self.recalibration = recalibrate(self.merged, data, strategy)
            self.cpu()

    def record(self, losses: dict[str, Tensor], spread: dict[str, Spread], total: Tensor) -> None:
        """Log a step, and keep what guards look at; the figures are of all processes' samples."""
        self._losses, self.spread = losses, spread
        # where the loss is on a device, a progress bar would wait for it at every step
        self.log("train/loss", total.detach(), prog_bar=self.device.type == "cpu")
        self.log_dict({f"train/loss/{task}": loss for task, loss in losses.items()})
        self.log_dict({f"train/marginal_entropy/{task}": found.marginal_entropy() for task, found in spread.items()})
        self.log_dict({f"train/top_class_share/{task}": found.top_class_share() for task, found in spread.items()})

    def backward_pass(self) -> BackwardPass:
        """What runs a batch of every task through the merged copy."""
        assert self.objective is not None
        return BackwardPass(self.merged, self.objective, self.task_weights, self.micro_batch, self.trainer.strategy)

    def check(self, data: Calibration, precision: str) -> None:
        """See whether model, data and precision fit together, before anything is written.

        Raises:
            ConfigError: they do not.
        """
        check_fit(self.merged, self.objective, self.task_weights, data, precision)
        check_steps(self.merged, self.micro_batch, data.batch_size, self._trainer)

    def check_data(self, data: Calibration) -> None:
        """See whether the data can serve the objective; a sample of every task is looked at.

        Raises:
            ConfigError: they cannot.
        """
        if self.objective is not None:
            for task in data.fitted:
                self.objective.check(task, data.samples(task, "calibration"), len(data.tasks[task].classnames))

    def check_rates(self, steps: int) -> None:
        """See whether optimisers and schedules can be what they say in a fit of so many steps.

        Raises:
            ConfigError: they cannot.
        """
        return

    def coefficients(self) -> Coefficients:
        """The current coefficients with everything that gives them meaning."""
        backbone, experts = self.merged.backbone, self.merged.task_vectors.experts
        protocol: Mapping[str, Any] = {}
        if self._trainer is not None and self.objective is not None:
            protocol = self._data().protocol | ({"selection": self.choice} if self.choice else {})
        protocol = {**protocol, **self.recalibration, **held_names(self.merged.parametrization.held, experts)}
        step = self.global_step if self._trainer is not None else 0
        if self.choice.get("step") is not None:
            step = self.choice["step"]
        return Coefficients(
            self.merged.task_vectors.to("cpu"),
            self.merged.parametrization,
            layout=backbone.layout(),
            dtype=self.merged.dtype,
            step=step,
            protocol=protocol,
            buffers=self.merged.recalibrated,
        )

    def on_validation_epoch_start(self) -> None:
        """Merge for the current coefficients, once for all tasks."""
        self._start_evaluation("validation")

    def on_test_epoch_start(self) -> None:
        """Merge for the current coefficients, once for all tasks."""
        self._start_evaluation("test")

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score the batch."""
        self._evaluate(batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score the batch."""
        self._evaluate(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the score per task and on average."""
        self._log_scores("validation")

    def on_test_epoch_end(self) -> None:
        """Log the score per task and on average."""
        self._log_scores("test")

    def first_batch(self, batch: dict[str, Batch]) -> dict[str, Batch]:
        """What of a step's batch the coefficients' gradient is computed on at once."""
        return batch

    def _first_gradient(self, data: Calibration) -> None:
        """The backward pass of the first step."""
        batch: dict[str, Batch] = on_device(data.steps()[0], self.device)
        self.backward_pass()(self.first_batch(batch))

    def _data(self) -> Calibration:
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, Calibration):
            raise ConfigError(
                "no calibration data: pass a Calibration data module to the trainer", got=type(data).__name__
            )
        return data

    def _start_evaluation(self, split: str) -> None:
        self._evaluated = self._data().labelled_tasks(split)
        with torch.no_grad():
            self.merged.merge()
        self._metrics = {task: MeanMetric().to(self.device) for task in self._evaluated}

    def _evaluate(self, batch: Batch, dataloader_idx: int) -> None:
        assert batch.labels is not None
        task = self._evaluated[dataloader_idx]
        # what a sharded copy makes at its first pass is for training too
        with torch.inference_mode(False), torch.no_grad():
            output = self.merged.backbone.output(self.merged(batch.inputs), task)
        self._metrics[task].update(self._data().metric(output, batch.labels))

    def _log_scores(self, split: str) -> None:
        name = self._data().metric.name
        values: dict[str, Tensor] = {task: metric.compute() for task, metric in self._metrics.items()}
        # of all processes' samples already: what Lightning averages are equals
        self.log_dict({f"{split}/{name}/{task}": value for task, value in values.items()}, sync_dist=True)
        self.log(f"{split}/{name}", torch.stack(list(values.values())).mean(), prog_bar=True, sync_dist=True)
