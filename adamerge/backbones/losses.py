"""Losses of language models: the cross-entropy of each sample's tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from adamerge.backbones.batch import IGNORED


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns each sample's mean cross-entropy over its labelled positions, in nats; a sample without any has 0.

    Args:
        logits: ``(samples, positions, classes)``.
        labels: ``(samples, positions)``, ``IGNORED`` where nothing is to be predicted.

    Returns:
        ``(samples,)``
    """
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(labels).sum(dim=1) / (labels != IGNORED).sum(dim=1).clamp_min(1)
