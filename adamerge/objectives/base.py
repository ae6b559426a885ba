"""The contract of an objective: one loss per sample from what the merged model makes of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from adamerge.backbones import Batch, Inputs, Output
from adamerge.backbones.inputs import count

Predict = Callable[[Inputs], Output]
"""Runs the merged model on inputs of one task, with the weights of this step's merge and without a gradient."""


class Samples(Protocol):
    """Preprocessed samples of one task's calibration split, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Inputs: ...


class Course(NamedTuple):
    """The samples, classes, steps and batch size that a fit is going to see; there are no labels in it.

    Attributes:
        samples: of each task that is fitted.
        classes: number of classes of each task.
        steps: of the fit.
        batch_size: samples per task and step, over all processes.
    """

    samples: Mapping[str, Samples]
    classes: Mapping[str, int]
    steps: int
    batch_size: int


class Objective(nn.Module, ABC):
    """Maps outputs of one task's samples to one loss per sample; the module takes weighted means and sums over tasks.

    Attributes:
        labelled: whether ``batch.labels`` are needed; where False, the batch has none.
        taught: whether ``batch.teacher`` is needed: outputs of the task's own expert, each computed once.
        hidden: numbers of the hidden states needed, or shares of the depth, of the merged model and of the teacher.
    """

    labelled: bool = False
    taught: bool = False
    hidden: tuple[float, ...] = ()

    @abstractmethod
    def forward(self, output: Output, batch: Batch) -> Tensor:
        """Returns the loss of each sample, ``(samples,)``, differentiable in the output."""

    def check(self, task: str, samples: Samples, classes: int) -> None:
        """Checks whether a task's data can serve the objective, before a fit begins.

        Args:
            task: whose data they are.
            samples: of its calibration split.
            classes: that it has; 0 where there are none, as with language models.

        Raises:
            ConfigError: they cannot.
        """
        return

    def begin(self, course: Course) -> None:
        """Prepares for a fit; called before a checkpoint is loaded, so that buffers made here are restored from it."""
        return

    def prepare(self, task: str, batch: Batch, predict: Predict) -> Batch:
        """Returns the batch that ``forward`` sees; called once per task and step, with all samples of this process.

        Here an objective looks at predictions before it asks for gradients, or changes the inputs; new ones have no lengths,
        unless it gives them new ones too.
        """
        return batch

    def weight(self, batch: Batch) -> Tensor:
        """Returns the weight of each sample in its task's mean, ``(samples,)``.

        Known before the forward pass, so that the mean over micro-batches and processes is that over the whole batch.
        """
        inputs = batch.inputs if isinstance(batch.inputs, Tensor) else next(iter(batch.inputs.values()))
        return torch.ones(count(batch.inputs), device=inputs.device)
