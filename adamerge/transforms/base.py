"""The contract of a transform: it makes new task vectors of task vectors, before merging."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from adamerge.deltas.base import Deltas, TransformedDeltas
from adamerge.errors import ConfigError

State = dict[str, list[float]]
"""What a transform learned from all tensors: a few numbers, stored in the coefficient file."""


class Transform(ABC):
    """Gives new deltas for old ones, one tensor at a time; perhaps of fewer experts, with names of their own."""

    def prepare(self, vectors: Mapping[str, Deltas]) -> State:
        """Looks at all tensors once, one at a time, and returns the few numbers that it needs at each read."""
        return {}

    def check_state(self, state: State, experts: int) -> None:
        """Checks whether ``state`` is one that ``prepare`` could have returned for so many experts.

        Raises:
            ConfigError: it is not.
        """
        if state and type(self).prepare is Transform.prepare:
            raise ConfigError(f"{type(self).__name__} keeps no state, got {state}")

    def experts(self, names: Sequence[str]) -> tuple[str, ...]:
        """Returns names of the experts it gives, from those of the experts it takes; by default the same.

        Raises:
            ConfigError: it needs other experts than these.
        """
        return tuple(names)

    @abstractmethod
    def deltas(self, name: str, deltas: Deltas, state: State, experts: Sequence[str]) -> Deltas:
        """Returns the new deltas of tensor ``name``; ``experts`` are the names of those in ``deltas``."""


class Elementwise(Transform):
    """Shared by the transforms that change a tensor's deltas element by element, across experts: dense, at each read.

    Attributes:
        local: whether ``apply`` makes each element's new deltas of that element's deltas alone, and may be given a part.
    """

    local: bool = False

    def deltas(self, name: str, deltas: Deltas, state: State, experts: Sequence[str]) -> Deltas:
        """Returns deltas that ``apply`` changes at each read."""
        return TransformedDeltas(deltas, lambda rows, _: self.apply(name, rows, state), self.local)

    @abstractmethod
    def apply(self, name: str, deltas: Tensor, state: State) -> Tensor:
        """Returns the new deltas of tensor ``name``: ``(experts, numel)`` in fp32 to the same shape."""


def check_states(transforms: Sequence[Transform], states: Sequence[State], experts: Sequence[Sequence[str]]) -> None:
    """Checks whether states are those of these transforms.

    Args:
        transforms: in their order.
        states: one for each.
        experts: names of the experts before each transform.

    Raises:
        ConfigError: they are not.
    """
    if len(states) != len(transforms):
        raise ConfigError("states: one per transform is needed", expected=len(transforms), got=len(states))
    for transform, state, names in zip(transforms, states, experts, strict=False):
        transform.check_state(state, len(names))
