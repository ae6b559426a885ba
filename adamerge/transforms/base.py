"""A transform: task vectors to task vectors, before merging."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from adamerge.deltas import Deltas
from adamerge.errors import ConfigError

State = dict[str, list[float]]
"""What a transform learned from all tensors: a few numbers, stored in the coefficient file."""


class Transform(ABC):
    """Changes the deltas of one tensor, element by element across experts."""

    def prepare(self, vectors: Mapping[str, Deltas]) -> State:
        """Look at all tensors once, one at a time, and return the few numbers that ``apply`` needs."""
        return {}

    def check_state(self, state: State, experts: int) -> None:
        """See whether ``state`` is one that ``prepare`` could have returned for so many experts.

        Raises:
            ConfigError: it is not.
        """
        if state and type(self).prepare is Transform.prepare:
            raise ConfigError(f"{type(self).__name__} keeps no state, got {state}")

    @abstractmethod
    def apply(self, name: str, deltas: Tensor, state: State) -> Tensor:
        """The new deltas of tensor ``name``: ``(experts, numel)`` in fp32 to the same shape."""
