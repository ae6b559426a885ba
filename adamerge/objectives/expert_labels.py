"""Expert labels: on its own task's inputs the merged model should predict the class that the task's expert predicts."""

from __future__ import annotations

import torch
from torch import Tensor

from adamerge.backbones import Batch, Output, Teacher
from adamerge.errors import DataError
from adamerge.objectives.base import Objective


class ExpertLabels(Objective):
    """Cross-entropy to the expert's own class: ``-log p_c``, ``c = argmax z_k``, z_k the logits of the task's expert.

    The hard form of ``LogitAlignment``: what the expert holds for less likely is not looked at. Of tokens, the mean over the
    positions that count. Which samples count is a choice of its own: ``WeightedByConfidence``, ``WhereAgreed``.

    Raises:
        DataError: the batch has no teacher.

    Reference: SyMerge (2024), https://arxiv.org/abs/2412.19098: self-labels by the experts.
    """

    taught = True

    def __init__(self) -> None:
        super().__init__()

    def forward(self, output: Output, batch: Batch) -> Tensor:
        """Returns cross-entropies ``(samples,)`` of logits ``(samples, [positions,] classes)`` to the expert's classes."""
        if batch.teacher is None:
            raise DataError("ExpertLabels: the batch has no teacher")
        logits = output.cropped(batch.teacher.logits.shape[1])
        classes = classes_of(batch.teacher)
        return output.mean(-logits.float().log_softmax(dim=-1).gather(-1, classes[..., None])[..., 0])


def classes_of(teacher: Teacher) -> Tensor:
    """Returns the classes that the expert predicts, int64 ``(samples, [positions])``."""
    largest = teacher.logits.argmax(dim=-1)
    if teacher.classes is None:
        return largest
    return torch.gather(teacher.classes, -1, largest[..., None])[..., 0].long()
