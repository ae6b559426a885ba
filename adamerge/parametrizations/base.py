"""A parametrization: from coefficients and the deltas of one tensor to the update of that tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from adamerge.deltas import Deltas
from adamerge.task_vectors import TaskVectors


class Parametrization(nn.Module, ABC):
    """Holds the only trainable parameters of a merge, all of them fp32.

    ``parametrization(name, deltas)`` is the update of tensor ``name`` (its shape, in fp32), differentiable in them.
    """

    initial: float
    """The coefficient that every expert starts from."""

    @abstractmethod
    def forward(self, name: str, deltas: Deltas) -> Tensor:
        """The update ``merged - base`` of tensor ``name``, of the tensor's shape."""

    @abstractmethod
    def coefficients(self) -> dict[str, Tensor]:
        """Constrained coefficients, differentiable: group name to ``(experts, coefficients of the group)``."""

    @abstractmethod
    def values(self) -> dict[str, Tensor]:
        """Raw values before the constraint, detached views: group name to ``(experts, coefficients of the group)``."""

    def load_values(self, values: Mapping[str, Tensor]) -> None:
        """Set the raw values, in place.

        Raises:
            KeyError: the groups are not exactly those of this parametrization.
            ValueError: a shape differs.
        """
        own = self.values()
        if own.keys() != values.keys():
            raise KeyError(f"groups differ: {sorted(own.keys() ^ values.keys())[:10]}")
        for group, value in values.items():
            if own[group].shape != value.shape:
                raise ValueError(f"'{group}': expected shape {tuple(own[group].shape)}, got {tuple(value.shape)}")
        with torch.no_grad():
            for group, value in values.items():
                own[group].copy_(value)

    def project_(self) -> None:
        """Put the raw values back into the constraint's set, in place; called after each optimiser step."""
        return


ParametrizationFactory = Callable[[TaskVectors], Parametrization]
"""What configs and code give: a parametrization that still waits for its task vectors."""
