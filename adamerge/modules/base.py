"""What every search for coefficients shares: the merged model, its heads, evaluation and what is written at the end."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from adamerge.backbones import Backbone, Batch
from adamerge.coefficients import Coefficients, read_coefficients
from adamerge.data import Calibration
from adamerge.errors import CoefficientsError, ConfigError
from adamerge.merged_model import MergedModel
from adamerge.objectives import Objective
from adamerge.parametrizations import ParametrizationFactory
from adamerge.task_vectors import TaskVectors

SUITABLE_PRECISION = {"32", "32-true", "bf16", "bf16-mixed", "None"}


class MergingModule(LightningModule, ABC):
    """A merged model under Lightning; its only parameters are the coefficients.

    Args:
        backbone: the network.
        task_vectors: base and experts.
        parametrization: which elements share a coefficient.
        objective: what drives the coefficients; None keeps the initial ones and opens no data.
        resident: hold the deltas in memory, or read them from disk at each step.
        init_from: a coefficient file of the same groups and experts to start from.

    Raises:
        CheckpointError: base, experts and backbone do not fit together.
        CoefficientsError: ``init_from`` does not fit.
    """

    def __init__(
        self,
        backbone: Backbone,
        task_vectors: TaskVectors,
        parametrization: ParametrizationFactory,
        objective: Objective | None = None,
        resident: bool = True,
        init_from: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.merged = MergedModel(backbone, task_vectors, parametrization(task_vectors), resident)
        self.objective = objective
        self._metrics: dict[str, MulticlassAccuracy] = {}
        self._evaluated: list[str] = []
        if init_from is not None:
            self._warm_start(Path(init_from))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, as the data module orders them."""
        return tuple(self._data().tasks)

    def setup(self, stage: str) -> None:
        """Check, and make the heads from the base's weights."""
        data = self._data()
        if stage == "fit":
            self.check(data, str(self.trainer.precision))
        self.merged.fill(self.merged.task_vectors.base.__getitem__)
        self.merged.backbone.build_heads(data.tasks)

    def check(self, data: Calibration, precision: str) -> None:
        """See whether model, data and precision fit together, before anything is written.

        Raises:
            ConfigError: they do not.
        """
        if precision not in SUITABLE_PRECISION:
            raise ConfigError(
                f"trainer.precision={precision} does not suit: coefficients must stay fp32, and gradients reach the merged "
                "copy without loss scaling",
                expected="32-true or bf16-mixed",
                got=precision,
                todo="backbone.dtype sets the merged copy's own dtype",
            )
        if self.merged.dtype == torch.float16:
            raise ConfigError("backbone.dtype=float16: gradients would underflow", expected="float32 or bfloat16")
        self._check_heads()
        if self.objective is not None and self.objective.labelled != data.labelled:
            raise ConfigError(
                f"{type(self.objective).__name__} {'needs' if self.objective.labelled else 'must not see'} labels",
                expected=f"data.labelled={self.objective.labelled}",
                got=f"data.labelled={data.labelled}",
            )
        unknown = [task for task in self.merged.task_vectors.experts if task not in data.tasks]
        if unknown:
            raise ConfigError(
                f"expert '{unknown[0]}' has no data", expected=f"a task of {list(data.tasks)}", got=unknown
            )

    def _check_heads(self) -> None:
        """Tensors that training does not see must not be merged: the export would differ from what was trained."""
        vectors = self.merged.task_vectors
        for name in vectors:
            if self.merged.backbone.trains(name):
                continue
            for task, checkpoint in vectors.checkpoints.items():
                if not torch.equal(checkpoint[name], vectors.base[name]):
                    raise ConfigError(
                        f"expert '{task}' changed '{name}', on which the merged model's training does not depend",
                        todo="pass include patterns of the part that is trained, such as ['visual.*']",
                    )

    def coefficients(self) -> Coefficients:
        """The current coefficients with everything that gives them meaning."""
        backbone = self.merged.backbone
        protocol: Mapping[str, Any] = {}
        if self._trainer is not None and self.objective is not None:
            protocol = self._data().protocol
        return Coefficients(
            self.merged.task_vectors.to("cpu"),
            self.merged.parametrization,
            backbone.layout(),
            self.merged.dtype,
            self.global_step if self._trainer is not None else 0,
            protocol,
        )

    def on_validation_epoch_start(self) -> None:
        """Merge for the current coefficients, once for all tasks."""
        self._start_evaluation("validation")

    def on_test_epoch_start(self) -> None:
        """Merge for the current coefficients, once for all tasks."""
        self._start_evaluation("test")

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count what is classified correctly."""
        self._evaluate(batch, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count what is classified correctly."""
        self._evaluate(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log accuracy per task and on average."""
        self._log_accuracy("validation")

    def on_test_epoch_end(self) -> None:
        """Log accuracy per task and on average."""
        self._log_accuracy("test")

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
        self._metrics = {}
        for task, words in self._data().tasks.items():
            if task in self._evaluated:
                self._metrics[task] = MulticlassAccuracy(len(words.classnames), average="micro", validate_args=False)
                self._metrics[task].to(self.device)

    def _evaluate(self, batch: Batch, dataloader_idx: int) -> None:
        assert batch.labels is not None
        task = self._evaluated[dataloader_idx]
        output = self.merged.backbone.output(self.merged(batch.inputs), task)
        self._metrics[task].update(output.logits, batch.labels)

    def _log_accuracy(self, split: str) -> None:
        values: dict[str, Tensor] = {task: metric.compute() for task, metric in self._metrics.items()}
        self.log_dict({f"{split}/accuracy/{task}": value for task, value in values.items()})
        self.log(f"{split}/accuracy", torch.stack(list(values.values())).mean(), prog_bar=True)

    def _warm_start(self, path: Path) -> None:
        metadata, values = read_coefficients(path)
        experts = self.merged.task_vectors.experts
        if sorted(metadata["rows"]) != sorted(experts):
            raise CoefficientsError(
                f"init_from {path}: its experts are not this run's",
                expected=sorted(experts),
                got=sorted(metadata["rows"]),
            )
        order: Sequence[int] = [metadata["rows"].index(task) for task in experts]
        try:
            self.merged.parametrization.load_values({group: value[order] for group, value in values.items()})
        except (KeyError, ValueError) as error:
            raise CoefficientsError(
                f"init_from {path}: {error.args[0]}", todo="use the same parametrization"
            ) from error
