"""How the merged copy exists: which weights of the network are there when, and in which process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from adamerge.backbones.structure import owner
from adamerge.merging.footprint import Footprint, Unit
from adamerge.task_vectors.automatic_storage import Automatic
from adamerge.task_vectors.memory import FP32
from adamerge.task_vectors.storage import Storage


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
        """Returns whether gradients can reach the tensor that is here."""
        return isinstance(owner(self.tensor), nn.Parameter)

    @property
    def gradient(self) -> Tensor | None:
        """Returns ``G`` of this tensor, as accumulated: the same view of the owner's gradient."""
        holder = owner(self.tensor)
        gradient = holder.grad
        if holder is self.tensor or gradient is None:
            return gradient
        if gradient.stride() != holder.stride():
            gradient = torch.empty_like(holder, dtype=gradient.dtype).copy_(gradient)
        offset = self.tensor.storage_offset() - holder.storage_offset()
        return gradient.as_strided(self.tensor.size(), self.tensor.stride(), offset)

    def forget(self) -> None:
        """Frees the gradient of the tensor that is here."""
        owner(self.tensor).grad = None

    def fill(self, tensor: Tensor) -> None:
        """Copies what of a whole on-disk tensor belongs here."""
        with torch.no_grad():
            self.tensor.copy_(self.cut(tensor), non_blocking=True)

    def cut(self, tensor: Tensor) -> Tensor:
        """Returns what of a whole on-disk tensor belongs here, in the shape it has here."""
        return tensor if self.part is None else tensor.reshape(-1)[self.part].view(self.tensor.shape)


Visit = Callable[[Mapping[str, Place]], None]
"""What is done with tensors of the copy, by on-disk name."""


class TransientBlock(Protocol):
    """A block of the network whose weights exist only while it runs.

    Attributes:
        names: on-disk names of its tensors.
    """

    names: tuple[str, ...]

    def to(self, device: torch.device) -> None:
        """Has the block run on another device from now on."""


class Copy(ABC):
    """Which weights of the network exist when.

    Attributes:
        collective: whether all processes go through each forward pass together, and each merges a part of every tensor.
        each_pass: whether every micro-batch merges anew.
        whole: whether all weights are in each process from a merge to its contraction, so that activation checkpointing may
            run a block again in the backward pass.
    """

    collective: bool = False
    each_pass: bool = False
    whole: bool = False

    @property
    def ready(self) -> bool:
        """Returns whether the weights of the copy have a place by now."""
        return True

    def transient(
        self, network: nn.Module, tensors: Mapping[str, Tensor], fetch: Visit, hand_on: Visit
    ) -> Sequence[TransientBlock]:
        """Returns the blocks whose weights exist only while they run; the rest of the network is always there.

        Args:
            network: whose modules run.
            tensors: on-disk name to a parameter or a view of one.
            fetch: fills tensors of a block; with grad enabled, ready for ``hand_on``.
            hand_on: takes the gradients of a block that were just accumulated.

        Raises:
            ConfigError: the network has no such blocks.
        """
        return ()

    def move(self, network: nn.Module, device: torch.device) -> None:
        """Brings the network to the device of the merges, before its tensors get their places there."""
        network.to(device)

    def places(self, network: nn.Module, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Place]:
        """Returns where the tensors are that are always there; asked again when the network has moved.

        Args:
            network: as it was moved.
            tensors: on-disk name to a parameter or a view of one.
            device: of the merges.

        Raises:
            ConfigError: a tensor cannot be where this copy wants it.
        """
        return {name: Place(tensor) for name, tensor in tensors.items()}

    @abstractmethod
    def footprint(self, units: Sequence[Unit], processes: int) -> Footprint:
        """Returns the memory that the copy takes in each process.

        Args:
            units: of the network.
            processes: of the run.
        """

    def storage_for(self, storage: Storage | None) -> Storage:
        """Returns the storage of the deltas that goes with this copy: as configured, or what fits where it is None.

        Raises:
            ConfigError: the two do not go together.
        """
        return Automatic() if storage is None else storage

    def alone(self) -> Copy:
        """Returns how the copy exists in one process, such as one that scores what several have trained."""
        return self

    def __str__(self) -> str:
        return type(self).__name__


class WholeCopy(Copy):
    """All weights, and the gradient of all: one merge and one contraction a step, however many micro-batches it has."""

    whole = True

    def footprint(self, units: Sequence[Unit], processes: int) -> Footprint:
        """Returns the memory of all weights and gradients, in every process."""
        weights = sum(unit.nbytes for unit in units)
        return Footprint(weights, FP32 * sum(unit.merged for unit in units), made=weights)
