"""Evaluation: scores per task, how much of the gap to the experts is closed, and whether predictions collapsed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from adamerge.backbones import Batch
from adamerge.data.loaders import on_device
from adamerge.data.metrics import Metric
from adamerge.errors import DataError
from adamerge.merging.merged_model import MergedModel
from adamerge.training.length_groups import grouped


@torch.no_grad()
def score(merged: MergedModel, task: str, batches: Iterable[Batch], metric: Metric) -> Tensor:
    """Returns the score of each labelled sample of a task, with the weights of the last merge or fill.

    Returns:
        ``(samples,)`` on the CPU, in the order of the batches.

    Raises:
        DataError: there are no samples, or no labels.
    """
    scores = []
    for batch in batches:
        if batch.labels is None:
            raise DataError(f"task '{task}': evaluation needs labels, and the batch has none")
        scores.append(batch_scores(merged, task, on_device(batch, merged.device), metric))
    if not scores:
        raise DataError(f"task '{task}': there is nothing to evaluate on")
    return torch.cat(scores).cpu()


def batch_scores(merged: MergedModel, task: str, batch: Batch, metric: Metric) -> Tensor:
    """Returns the score of each sample of a labelled batch; samples of like length run together, as in a step of a fit.

    Args:
        merged: with the weights of its last merge or fill.
        task: whose samples they are.
        batch: on the device of the merged model.
        metric: of a sample.

    Returns:
        ``(samples,)`` on the device, in the order of the batch.
    """
    groups, scores = grouped({task: batch}, None, merged), []
    for inputs, ((_, _, samples),) in groups.passes():
        encoded = merged(inputs)
        labels = groups.batch[task].rows(samples).within(encoded).labels
        assert labels is not None
        scores.append(metric(merged.backbone.output(encoded, task), labels))
    places = groups.back(task)
    return torch.cat(scores) if places is None else torch.cat(scores)[places]


def means(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns each task's mean score, from each task's scores ``(samples,)``."""
    return {task: float(values.double().mean()) for task, values in scores.items()}


def average(per_task: Mapping[str, float]) -> float:
    """Returns the plain mean over tasks: every task counts the same, whatever its number of samples."""
    return sum(per_task.values()) / len(per_task)


def gap_closed(method: float, floor: float, ceiling: float) -> float:
    """Returns the share of the way from ``floor`` (task arithmetic) to ``ceiling`` (the experts); NaN without a gap."""
    return (method - floor) / (ceiling - floor) if ceiling != floor else math.nan


def paired_step(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[float, float]:
    """Returns the difference of two models' average scores on the same samples, and its paired standard error.

    The average weights tasks equally, so its variance is the mean over tasks of var(d_t) / n_t, divided by their number,
    with d_t the differences per sample.
    """
    differences = {task: one[task].double() - other[task].double() for task in one}
    tasks = len(differences)
    variance = sum(float(d.var()) / len(d) for d in differences.values()) / tasks**2
    return sum(float(d.mean()) for d in differences.values()) / tasks, math.sqrt(variance)


class Spread:
    """Measures how spread predictions are, added up over micro-batches; a collapsed model has entropy 0 and share 1.

    Args:
        sums: of another's ``sums()``, or of several added up; none yet when None.
    """

    def __init__(self, sums: Tensor | None = None) -> None:
        self._probabilities: Tensor | None = None
        self._counts: Tensor | None = None
        if sums is not None:
            self._probabilities, self._counts = sums.chunk(2)

    def update(self, logits: Tensor, mask: Tensor | None = None) -> None:
        """Adds the predictions of a batch to the sums.

        Args:
            logits: ``(samples, [positions,] classes)``.
            mask: bool ``(samples, positions)``, those that count.
        """
        logits = logits.flatten(0, -2).float()
        weight = torch.ones_like(logits[:, 0]) if mask is None else mask.flatten().float()
        probabilities = (weight.unsqueeze(1) * logits.softmax(dim=-1)).sum(dim=0)  # a product would follow autocast
        counts = torch.zeros_like(probabilities).index_add_(0, logits.argmax(dim=-1), weight)
        if self._probabilities is None or self._counts is None:
            self._probabilities, self._counts = probabilities, counts
        else:
            self._probabilities, self._counts = self._probabilities + probabilities, self._counts + counts

    def sums(self) -> Tensor:
        """Returns the sum of all predicted probabilities, and how often each class was largest; ``(2 * classes,)``."""
        assert self._probabilities is not None and self._counts is not None
        return torch.cat([self._probabilities, self._counts])

    def marginal_entropy(self) -> Tensor:
        """Returns the entropy of the mean prediction divided by ``log(classes)``; a scalar."""
        assert self._probabilities is not None
        mean = self._probabilities / self._probabilities.sum()
        return -(mean * mean.clamp_min(1e-30).log()).sum() / math.log(max(len(mean), 2))

    def top_class_share(self) -> Tensor:
        """Returns the share of predictions that the most frequent class takes; a scalar."""
        assert self._counts is not None
        return self._counts.max() / self._counts.sum()
