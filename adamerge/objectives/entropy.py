"""Entropy minimisation: the merged model should be sure of its predictions."""

from __future__ import annotations

import math

from torch import Tensor

from adamerge.backbones import Batch, Output
from adamerge.objectives.base import Objective


class Entropy(Objective):
    """Shannon entropy of the predicted classes, in nats: ``H = -sum_c p_c log p_c``, ``p = softmax(logits)``.

    Where every position gets a prediction, the mean over the positions that count.

    Args:
        normalise: divide by ``log(classes)``, so that tasks with many classes do not dominate the sum over tasks.

    Reference: AdaMerging (Yang et al., 2024), https://arxiv.org/abs/2310.02575, equation 4.
    """

    def __init__(self, normalise: bool = False) -> None:
        super().__init__()
        self.normalise = normalise

    def forward(self, output: Output, batch: Batch) -> Tensor:
        """Returns entropies ``(samples,)`` of logits ``(samples, [positions,] classes)``."""
        log_probabilities = output.logits.float().log_softmax(dim=-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1)
        return output.mean(entropy / math.log(max(output.logits.shape[-1], 2)) if self.normalise else entropy)
