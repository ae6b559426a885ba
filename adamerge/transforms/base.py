"""A transform: task vectors to task vectors, before merging."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from adamerge.deltas import Deltas

State = dict[str, list[float]]
"""What a transform learned from all tensors: a few numbers, stored in the coefficient file."""


class Transform(ABC):
    """Changes the deltas of one tensor, element by element across experts."""

    def prepare(self, vectors: Mapping[str, Deltas]) -> State:
        """Look at all tensors once, one at a time, and return the few numbers that ``apply`` needs."""
        return {}

    @abstractmethod
    def apply(self, name: str, deltas: Tensor, state: State) -> Tensor:
        """The new deltas of tensor ``name``: ``(experts, numel)`` in fp32 to the same shape."""
