"""Evaluation: accuracy per task, how much of the gap to the experts is closed, and whether predictions collapsed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from adamerge.backbones import Batch
from adamerge.errors import DataError
from adamerge.merged_model import MergedModel


@torch.no_grad()
def correct(merged: MergedModel, task: str, batches: Iterable[Batch]) -> Tensor:
    """Whether each labelled sample of a task is classified correctly, with the weights of the last merge or fill.

    Returns:
        bool ``(samples,)`` on the CPU, in the order of the batches.
    """
    found = []
    for inputs, labels in batches:
        if labels is None:
            raise DataError(f"task '{task}': evaluation needs labels, and the batch has none")
        output = merged.backbone.output(merged(inputs.to(merged.device, non_blocking=True)), task)
        found.append(output.logits.argmax(dim=-1) == labels.to(merged.device))
    if not found:
        raise DataError(f"task '{task}': there is nothing to evaluate on")
    return torch.cat(found).cpu()


def accuracies(hits: Mapping[str, Tensor]) -> dict[str, float]:
    """Task to accuracy, a fraction in [0, 1], of task to bool ``(samples,)``."""
    return {task: float(hit.double().mean()) for task, hit in hits.items()}


def average(per_task: Mapping[str, float]) -> float:
    """Plain mean over tasks: every task counts the same, whatever its number of samples."""
    return sum(per_task.values()) / len(per_task)


def gap_closed(method: float, floor: float, ceiling: float) -> float:
    """Share of the way from ``floor`` (tuned task arithmetic) to ``ceiling`` (the individual experts); NaN without a gap."""
    return (method - floor) / (ceiling - floor) if ceiling != floor else math.nan


def paired_step(better: Mapping[str, Tensor], worse: Mapping[str, Tensor]) -> tuple[float, float]:
    """Difference of the average accuracies of two models on the same samples, and its paired standard error.

    The average weights tasks equally, so its variance is the mean over tasks of var(d_t) / n_t, divided by their number,
    with d_t the differences per sample.
    """
    differences = {task: better[task].double() - worse[task].double() for task in better}
    tasks = len(differences)
    variance = sum(float(d.var()) / len(d) for d in differences.values()) / tasks**2
    return sum(float(d.mean()) for d in differences.values()) / tasks, math.sqrt(variance)


def prediction_spread(logits: Tensor) -> tuple[Tensor, Tensor]:
    """How spread the predictions of a batch are: a collapsed model gives 0 and 1.

    Args:
        logits: ``(samples, classes)``.

    Returns:
        Entropy of the mean prediction divided by ``log(classes)``, and the share of the most frequent class; scalars.
    """
    probabilities = logits.float().softmax(dim=-1)
    mean = probabilities.mean(dim=0)
    marginal = -(mean * mean.clamp_min(1e-30).log()).sum() / math.log(max(logits.shape[-1], 2))
    counts = torch.zeros_like(mean).index_add_(0, probabilities.argmax(dim=-1), torch.ones_like(probabilities[:, 0]))
    return marginal, counts.max() / len(logits)
