"""A backbone: the network whose own parameters hold the merged copy, its inputs, and its frozen task heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from adamerge.layout import Layout


class Batch(NamedTuple):
    """Samples of one task.

    Attributes:
        inputs: preprocessed, ``(samples, ...)``.
        labels: ``(samples,)``; None for objectives that are not labelled, so that labels cannot reach them.
    """

    inputs: Tensor
    labels: Tensor | None = None


@dataclass(frozen=True)
class Output:
    """What the network makes of one task's inputs.

    Attributes:
        logits: ``(samples, classes)`` of the task's frozen head.
        features: ``(samples, width)`` before the head.
    """

    logits: Tensor
    features: Tensor


class Task(Protocol):
    """What a backbone must know of a task to build its head."""

    @property
    def classnames(self) -> Sequence[str]:
        """Names of the classes, in label order."""

    @property
    def templates(self) -> Sequence[str]:
        """Prompts with ``{}`` where the class name goes."""


class Backbone(ABC):
    """A network that is refilled in place; functional towards the outside: same weights and inputs, same outputs.

    Attributes:
        network: the module; always in eval mode.
        heads: frozen head of each task, on the device of the network.
    """

    network: nn.Module
    heads: dict[str, nn.Module]

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """On-disk name to the in-memory parameter or buffer it fills, one name per storage."""

    def trains(self, name: str) -> bool:
        """Whether ``features`` depend on the tensor of this on-disk name; the others must be the same in all experts."""
        return True

    @abstractmethod
    def build_heads(self, tasks: Mapping[str, Task]) -> None:
        """Make the frozen heads; called when the network holds the base's weights."""

    @abstractmethod
    def layout(self) -> Layout:
        """How a folder with this network's weights looks to the library that loads it."""

    @abstractmethod
    def preprocess(self, sample: Any) -> Tensor:
        """One decoded sample to the compact tensor that is cached and moved to the device."""

    @abstractmethod
    def features(self, inputs: Tensor) -> Tensor:
        """Preprocessed inputs ``(samples, ...)``, of any mixture of tasks, to features ``(samples, width)``."""

    def output(self, features: Tensor, task: str) -> Output:
        """The task's head on its samples' features."""
        return Output(logits=self.heads[task](features), features=features)

    def to(self, device: torch.device) -> None:
        """Move network and heads."""
        self.network.to(device)
        for head in self.heads.values():
            head.to(device)
