"""The scorer: merged models, the base and the experts on labelled data, with one network for all of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from adamerge.artifacts.coefficients import Coefficients
from adamerge.backbones import Backbone
from adamerge.data import Calibration
from adamerge.data.metrics import Accuracy
from adamerge.merging.copies import Copy
from adamerge.merging.merged_model import MergedModel
from adamerge.parametrizations import ParametrizationFactory, TaskWise
from adamerge.task_vectors.storage import Disk
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.confusions import Confusions, exchanged_lines, far_below_lines
from adamerge.training.evaluation import score

Scores = dict[str, Tensor]
"""Scores of each sample, ``(samples,)``, by task."""


class Scorer:
    """Scores merged models on one split, with one backbone and samples decoded once.

    Args:
        backbone: refilled for every model.
        data: labelled splits.
        vectors: base and experts.
        split: ``test`` or ``validation``.
        copy: whether each model exists at once or block by block, with the same scores; at once when None.

    Attributes:
        confusions: of the model that was scored last: task to samples by label and predicted class, where there are classes.
    """

    def __init__(
        self, backbone: Backbone, data: Calibration, vectors: TaskVectors, split: str, copy: Copy | None = None
    ) -> None:
        self.backbone, self.data, self.vectors, self.split, self.copy = backbone, data, vectors, split, copy
        self.confusions: dict[str, Tensor] = {}
        data.serve(backbone)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._plain()
        backbone.build_heads(data.tasks, vectors.checkpoints)

    def base(self) -> Scores:
        """Returns the scores of the base, without any task vector, on all tasks."""
        return self._score(self._plain())

    def experts(self) -> Scores:
        """Returns the scores of each expert on its own task, and of the base on tasks without an expert of their name."""
        hits: Scores = {}
        model = self._plain()
        for task in self.data.tasks:
            if task in self.vectors.checkpoints:
                model.fill_expert(task)
            else:
                model.fill(self.vectors.base.__getitem__)
            hits |= self._score(model, [task])
        return hits

    def merged(self, vectors: TaskVectors, parametrization: ParametrizationFactory) -> Scores:
        """Returns the scores of a merged model with the parametrization's initial coefficients, on all tasks."""
        return self.of(Coefficients(vectors, parametrization(vectors)))

    def of(self, coefficients: Coefficients) -> Scores:
        """Returns the scores of the merged model that coefficients describe, on all tasks."""
        model = self._model(coefficients)
        with torch.no_grad():
            model.merge()
        return self._score(model)

    def _plain(self) -> MergedModel:
        """Returns a merged model whose coefficients are all zero, which is the base."""
        return self._model(Coefficients(self.vectors, TaskWise(self.vectors, init=0.0)))

    def _model(self, coefficients: Coefficients) -> MergedModel:
        """Returns a merged model on the backbone, which obeys one model alone: earlier ones cannot be used any more."""
        parametrization = coefficients.parametrization.to(self.device)
        return MergedModel(
            self.backbone,
            coefficients.task_vectors,
            parametrization,
            Disk(),
            buffers=coefficients.buffers,
            copy=self.copy,
        )

    def _score(self, model: MergedModel, tasks: Sequence[str] | None = None) -> Scores:
        names = list(self.data.tasks) if tasks is None else tasks
        scores = {}
        for task in names:
            metric = Confusions() if type(self.data.metric) is Accuracy else self.data.metric
            scores[task] = score(model, task, self.data.eval_dataloader(task, self.split), metric)
            if isinstance(metric, Confusions) and metric.counts is not None:
                self.confusions[task] = metric.counts
        return scores

    def doubts(self, base: Scores, experts: Scores) -> list[str]:
        """Returns, and warns of, signs that labels and rows of a head mean other classes.

        It reads the confusions of the experts, so ``experts`` is called right before it.

        Args:
            base: scores of the base.
            experts: of each expert on its own task.
        """
        own = [task for task in self.data.tasks if task in self.vectors.checkpoints]
        counts = {task: self.confusions[task] for task in own if task in self.confusions}
        return told(
            [
                *far_below_lines(base, {task: experts[task] for task in own}, self.data.metric),
                *exchanged_lines(counts, classnames_of(self.data), "its own expert"),
            ]
        )


def told(lines: Sequence[str]) -> list[str]:
    """Warns of each line, and returns them."""
    for line in lines:
        warnings.warn(line, stacklevel=2)
    return list(lines)


def classnames_of(data: Calibration) -> dict[str, Sequence[str]]:
    """Returns the names of the classes of every task."""
    return {task: words.classnames for task, words in data.tasks.items()}
