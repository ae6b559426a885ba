"""An objective: one loss per sample from what the merged model makes of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from adamerge.backbones import Batch, Inputs, Output
from adamerge.backbones.inputs import count

Predict = Callable[[Inputs], Output]
"""Runs the merged model on inputs of one task, with the weights of this step's merge and without a gradient."""


class Objective(nn.Module, ABC):
    """Maps outputs of one task's samples to one loss per sample; the module takes weighted means and sums over tasks.

    Attributes:
        labelled: whether ``batch.labels`` are needed; where False, the batch has none.
        taught: whether ``batch.teacher`` is needed: outputs of the task's own expert, each computed once.
        hidden: numbers of the hidden states needed, of the merged model and of the teacher.
    """

    labelled: bool = False
    taught: bool = False
    hidden: tuple[int, ...] = ()

    @abstractmethod
    def forward(self, output: Output, batch: Batch) -> Tensor:
        """Loss of each sample, ``(samples,)``, differentiable in the output."""

    def prepare(self, task: str, batch: Batch, predict: Predict) -> Batch:
        """The batch that ``forward`` shall see; called once per task and step, with all samples of this process.

        Here an objective looks at predictions before it asks for gradients, or changes the inputs.
        """
        return batch

    def weight(self, batch: Batch) -> Tensor:
        """Weight of each sample in its task's mean, ``(samples,)``.

        Known before the forward pass, so that the mean over micro-batches and processes is that over the whole batch.
        """
        inputs = batch.inputs if isinstance(batch.inputs, Tensor) else next(iter(batch.inputs.values()))
        return torch.ones(count(batch.inputs), device=inputs.device)
