"""Outputs: the features that a network makes of inputs, and the logits that a task's head makes of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """Features that the network makes of inputs of any mixture of tasks, before any head.

    Attributes:
        features: ``(samples, width)``, or ``(samples, positions, width)`` where every position gets a prediction.
        hidden: the chosen hidden states, each ``(samples, positions, width)``.
        mask: bool ``(samples, positions)``, the positions whose prediction counts; None where there is one per sample.
        hidden_mask: bool ``(samples, positions)``, the positions of ``hidden`` that count; None for all.
    """

    features: Tensor
    hidden: tuple[Tensor, ...] = ()
    mask: Tensor | None = None
    hidden_mask: Tensor | None = None

    def rows(self, which: slice) -> Encoded:
        """Returns features, hidden states and masks of some of the samples."""
        return Encoded(
            self.features[which],
            tuple(states[which] for states in self.hidden),
            None if self.mask is None else self.mask[which],
            None if self.hidden_mask is None else self.hidden_mask[which],
        )


@dataclass(frozen=True)
class Output:
    """Logits that network and head make of one task's inputs.

    Attributes:
        logits: ``(samples, classes)``, or ``(samples, positions, classes)``.
        encoded: what the head was given.
    """

    logits: Tensor
    encoded: Encoded

    @property
    def features(self) -> Tensor:
        """Returns the features before the head, ``(samples, [positions,] width)``."""
        return self.encoded.features

    @property
    def mask(self) -> Tensor | None:
        """Returns which positions' predictions count, bool ``(samples, positions)``; None with one per sample."""
        return self.encoded.mask

    def mean(self, values: Tensor) -> Tensor:
        """Returns each sample's mean over the positions that count: ``(samples, [positions])`` to ``(samples,)``."""
        return values if self.mask is None else masked_mean(values, self.mask[:, : values.shape[1]])

    def cropped(self, positions: int) -> Tensor:
        """Returns logits of the first ``positions``: the rest is padding that other tasks' samples asked for."""
        return self.logits if self.mask is None else self.logits[:, :positions]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the mean of ``(samples, positions)`` over positions in ``mask``: ``(samples,)``, 0 where none is."""
    counted = torch.where(mask, values, 0.0).sum(dim=1)
    return counted / mask.sum(dim=1).clamp_min(1)
