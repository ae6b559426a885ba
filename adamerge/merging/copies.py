"""How the merged copy exists: which weights of the network are there when, and in which process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from adamerge.backbones.structure import owner
from adamerge.merging.footprint import Held, Unit
from adamerge.task_vectors.automatic_storage import Automatic
from adamerge.task_vectors.storage import FP32, Storage


class Place:
    """Where one on-disk tensor is in the merged copy.

    Args:
        tensor: a parameter or buffer, or a view of one.

    Attributes:
        part: what of the flattened on-disk tensor is here; None for all of it.
    """

    part: slice | None = None

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def is_parameter(self) -> bool:
        """Whether gradients can reach it."""
        return isinstance(owner(self.tensor), nn.Parameter)

    @property
    def gradient(self) -> Tensor | None:
        """``G`` of it, as accumulated: the same view of the owner's gradient."""
        holder = owner(self.tensor)
        gradient = holder.grad
        if holder is self.tensor or gradient is None:
            return gradient
        if gradient.stride() != holder.stride():
            gradient = torch.empty_like(holder, dtype=gradient.dtype).copy_(gradient)
        offset = self.tensor.storage_offset() - holder.storage_offset()
        return gradient.as_strided(self.tensor.size(), self.tensor.stride(), offset)

    def forget(self) -> None:
        """Let the gradient go."""
        owner(self.tensor).grad = None

    def cut(self, tensor: Tensor) -> Tensor:
        """What of a whole on-disk tensor belongs here, in the shape it has here."""
        return tensor if self.part is None else tensor.reshape(-1)[self.part].view(self.tensor.shape)


Visit = Callable[[Mapping[str, Place]], None]
"""What is done with tensors of the copy, by on-disk name."""


class Passing(Protocol):
    """A part of the network whose weights exist only while it runs.

    Attributes:
        names: on-disk names of its tensors.
        fetch: fills them; with grad enabled, ready for ``hand_on``.
        hand_on: takes the gradients that were just accumulated.
    """

    names: tuple[str, ...]
    fetch: Visit
    hand_on: Visit

    def to(self, device: torch.device) -> None:
        """Run on another device from now on."""


class Copy(ABC):
    """Which weights of the network exist when.

    Attributes:
        collective: whether all processes go through each forward pass together, and each merges a part of every tensor.
        each_pass: whether every micro-batch merges anew.
    """

    collective: bool = False
    each_pass: bool = False

    @property
    def ready(self) -> bool:
        """Whether the weights have a place by now."""
        return True

    @abstractmethod
    def passing(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> list[Passing]:
        """The parts whose weights exist only while they run; the rest of the network is always there.

        Args:
            network: whose modules run.
            tensors: on-disk name to a parameter or a view of one.

        Raises:
            ConfigError: the network has no such parts.
        """

    def move(self, network: nn.Module, device: torch.device) -> None:
        """Bring the network to the device of the merges, before its tensors get their places there."""
        network.to(device)

    def places(self, network: nn.Module, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Place]:
        """Where the tensors are that are always there; asked again when the network has moved.

        Args:
            network: as it was moved.
            tensors: on-disk name to a parameter or a view of one.
            device: of the merges.

        Raises:
            ConfigError: a tensor cannot be where this copy wants it.
        """
        return {name: Place(tensor) for name, tensor in tensors.items()}

    @abstractmethod
    def held(self, units: Sequence[Unit], processes: int) -> Held:
        """What it takes in each process.

        Args:
            units: of the network.
            processes: of the run.
        """

    def stored(self, storage: Storage | None) -> Storage:
        """The storage of the deltas that goes with it: as configured, or what fits where it is None.

        Raises:
            ConfigError: the two do not go together.
        """
        return Automatic() if storage is None else storage

    def __str__(self) -> str:
        return type(self).__name__


class WholeCopy(Copy):
    """All weights, and the gradient of all: one merge and one contraction a step, however many micro-batches it has."""

    def passing(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> list[Passing]:
        """None."""
        return []

    def held(self, units: Sequence[Unit], processes: int) -> Held:
        """All, in every process."""
        weights = sum(unit.nbytes for unit in units)
        return Held(weights, FP32 * sum(unit.merged for unit in units), made=weights)
