"""The contract of a parametrization: from coefficients and the deltas of one tensor to the update of that tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from adamerge.deltas.base import Deltas
from adamerge.deltas.groups import Groups
from adamerge.task_vectors.task_vectors import TaskVectors

Update = Callable[[str, Deltas], Tensor]
"""Name and deltas of a tensor to its update, of the tensor's shape, in fp32."""


class Parametrization(nn.Module, ABC):
    """Holds the only trainable parameters of a merge, all of them fp32.

    ``parametrization(name, deltas)`` is the update of tensor ``name`` (its shape, in fp32), differentiable in them.
    """

    initial: float
    """The coefficient that every expert starts from."""

    probed: bool = True
    """Whether a fit looks, before its first step, for coefficients whose gradient is nothing but rounding, and holds them.
    It takes a dozen times the memory of the coefficients for a moment."""

    held: Mapping[str, Tensor] = MappingProxyType({})
    """Coefficients that are not learned although they could be: group name to booleans ``(experts, coefficients of the
    group)``, of all groups or of none, on the device of the parameters."""

    held_pairs: Tensor | float = 0.0
    """In how many groups an expert has no coefficient that is learned, summed over experts."""

    def hold(self, held: Mapping[str, Tensor]) -> None:
        """Remembers which coefficients are held, for whoever looks at those that are learned."""
        self.held = dict(held)
        self.held_pairs = torch.stack([mask.all(dim=1).sum() for mask in held.values()]).sum() if held else 0.0

    @abstractmethod
    def forward(self, name: str, deltas: Deltas) -> Tensor:
        """Returns the update ``merged - base`` of tensor ``name``, of the tensor's shape."""

    def linear(self, name: str) -> tuple[Tensor, Groups] | None:
        """Returns the coefficients ``c`` of tensor ``name``, ``(experts, count)``, and which elements use which.

        For updates that are ``sum_k c[k, g(e)] tau_k[e]`` and nothing else, which merges then sum and contract piece by
        piece, without autograd; differentiable in the parameters. None where ``forward`` has another formula: it is called
        with the deltas of the whole tensor then, and differentiated as it is.
        """
        return None

    @property
    def index_bytes(self) -> int:
        """Returns the bytes of indices that contractions keep beside the parameters, from the first one on."""
        return 0

    @property
    def transient_per_element(self) -> int:
        """Returns the temporary bytes per element while tensors are summed."""
        return 0

    @abstractmethod
    def coefficients(self) -> dict[str, Tensor]:
        """Returns constrained coefficients, differentiable: group name to ``(experts, coefficients of the group)``."""

    def begun(self, group: str) -> Tensor | float:
        """Returns the coefficients of a group that a fit begins with: one for all, or as many as an expert has there."""
        return self.initial

    def sizes(self) -> dict[str, Tensor]:
        """Returns how large each expert's coefficients are, as factors of its task vector: group name to ``(experts,)``.

        What is held does not count.
        """
        with torch.no_grad():
            return {
                group: (torch.where(self.held[group], 0.0, own) if group in self.held else own).abs().amax(dim=1)
                for group, own in self.coefficients().items()
                if own.numel()
            }

    @staticmethod
    def moments(values: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns mean and standard deviation of what multiplies an expert's elements: name to two of ``(experts,)``.

        Args:
            values: coefficients or raw values as a file has them: group name to ``(experts, coefficients of the group)``.
        """
        return {group: (own.mean(dim=1), own.std(dim=1, correction=0)) for group, own in values.items()}

    @abstractmethod
    def values(self) -> dict[str, Tensor]:
        """Returns detached views of raw values: group name to ``(experts, coefficients of the group)``."""

    def load_values(self, values: Mapping[str, Tensor]) -> None:
        """Sets the raw values, in place.

        Raises:
            KeyError: the groups are not exactly those of this parametrization.
            ValueError: a shape differs.
        """
        _copy(self.values(), values, "groups")

    def masks(self) -> dict[str, nn.Parameter]:
        """Returns the logits of a learned mask of elements or components, by tensor name; none where there is no mask."""
        return {}

    def load_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Sets the logits of the mask, in place.

        Raises:
            KeyError: the tensors are not exactly those of this parametrization's mask.
            ValueError: a shape differs.
        """
        _copy(self.masks(), masks, "masked tensors")

    def draw(self, number: int) -> Update:
        """Returns the updates in the ``number``-th merge of a search: those of this parametrization unless it is random.

        What is evaluated, saved and exported is always the parametrization itself.
        """
        return self.forward

    def project_(self) -> None:
        """Puts the raw values back into the constraint's set, in place; called after each optimiser step."""
        return


def _copy(own: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    if own.keys() != given.keys():
        raise KeyError(f"{what} differ: {sorted(own.keys() ^ given.keys())[:10]}")
    for name, value in given.items():
        if own[name].shape != value.shape:
            raise ValueError(f"'{name}': expected shape {tuple(own[name].shape)}, got {tuple(value.shape)}")
    with torch.no_grad():
        for name, value in given.items():
            own[name].copy_(value)


ParametrizationFactory = Callable[[TaskVectors], Parametrization]
"""What configs and code give: a parametrization that still waits for its task vectors."""
