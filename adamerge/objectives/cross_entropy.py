"""Cross-entropy to the labels: the supervised objective, for classes and for the tokens of a language model."""

from __future__ import annotations

import torch
from torch import Tensor

from adamerge.backbones import IGNORED, Batch, Output
from adamerge.backbones.losses import token_losses
from adamerge.errors import DataError
from adamerge.objectives.base import Objective


class CrossEntropy(Objective):
    """``-log p(label)`` of each sample, in nats; for tokens, the mean over the positions that have a label.

    Labels that are ``IGNORED`` count nothing. Tasks are averaged by samples, not by tokens, as in evaluation.

    Raises:
        DataError: the batch has no labels.

    Reference: aTLAS (Zhang et al., 2024), https://arxiv.org/abs/2407.02880, for task addition on labelled data.
    """

    labelled = True

    def __init__(self) -> None:
        super().__init__()

    def forward(self, output: Output, batch: Batch) -> Tensor:
        """Returns losses ``(samples,)``; labels are ``(samples, [positions])``, logits have a last dimension more."""
        if batch.labels is None:
            raise DataError("CrossEntropy: the batch has no labels", todo="set data.labelled=true")
        if batch.labels.ndim == 2:
            return token_losses(output.cropped(batch.labels.shape[1]), batch.labels)
        return torch.nn.functional.cross_entropy(
            output.logits.float(), batch.labels, ignore_index=IGNORED, reduction="none"
        )
