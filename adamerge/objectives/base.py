"""An objective: one loss per sample from what the merged model makes of it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from adamerge.backbones import Batch, Output


class Objective(nn.Module, ABC):
    """Maps outputs of one task's samples to one loss per sample; the module takes weighted means and sums over tasks.

    Attributes:
        labelled: whether ``batch.labels`` are needed; where False, the batch has none.
    """

    labelled: bool = False

    @abstractmethod
    def forward(self, output: Output, batch: Batch) -> Tensor:
        """Loss of each sample, ``(samples,)``, differentiable in the output."""

    def weight(self, batch: Batch) -> Tensor:
        """Weight of each sample in its task's mean, ``(samples,)``.

        Known before the forward pass, so that the mean over micro-batches and processes is that over the whole batch.
        """
        return torch.ones(len(batch.inputs), device=batch.inputs.device)
