"""Split scores: the merged model's score on each task's labelled split, over all batches and processes of an evaluation."""

from __future__ import annotations

import torch
from lightning import LightningModule
from torch import Tensor
from torchmetrics import MeanMetric

from adamerge.backbones import Batch
from adamerge.data import Calibration
from adamerge.merging.merged_model import MergedModel
from adamerge.training.evaluation import batch_scores


class SplitScores:
    """Adds up the merged model's scores over one pass after another over a split.

    Args:
        merged: on its device.
    """

    def __init__(self, merged: MergedModel) -> None:
        self.merged = merged
        self._means: dict[str, MeanMetric] = {}

    def begin(self, data: Calibration, split: str) -> None:
        """Begins a pass over a split: merges for the current coefficients, once for all tasks.

        Args:
            data: with labels of the split.
            split: ``validation`` or ``test``.
        """
        with torch.no_grad():
            self.merged.merge()
        self._means = {task: MeanMetric().to(self.merged.device) for task in data.labelled_tasks(split)}
        self._metric, self._name = data.metric, f"{split}/{data.metric.name}"

    def update(self, batch: Batch, number: int) -> None:
        """Scores a batch of the task that has this number among those with labels."""
        task = list(self._means)[number]
        # what a sharded copy makes at its first pass is for training too
        with torch.inference_mode(False), torch.no_grad():
            scores = batch_scores(self.merged, task, batch, self._metric)
        self._means[task].update(scores)

    def log(self, module: LightningModule) -> None:
        """Logs each task's mean score and the plain mean over tasks; they are of all processes' samples."""
        scores: dict[str, Tensor] = {task: mean.compute() for task, mean in self._means.items()}
        # what Lightning averages over processes are equals
        module.log_dict({f"{self._name}/{task}": value for task, value in scores.items()}, sync_dist=True)
        module.log(self._name, torch.stack(list(scores.values())).mean(), prog_bar=True, sync_dist=True)
