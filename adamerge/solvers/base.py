"""The contract of a solver: of all experts' deltas of one tensor it makes one delta, before anything is learned."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from adamerge.deltas.base import Deltas
from adamerge.errors import ConfigError
from adamerge.solvers.matrices import Matrix, matrices


class Solver(ABC):
    """Makes one merged task vector of several, tensor by tensor; its constructor's arguments are its attributes.

    The same deltas give the same bits on the same machine with the same threads, in whatever order tensors are solved.

    Attributes:
        sees_inputs: whether it needs unlabelled samples, as a ``SequentialSolver`` does; else weights are all it sees.
    """

    sees_inputs: ClassVar[bool] = False

    @abstractmethod
    def solve(self, name: str, deltas: Deltas) -> Tensor:
        """Returns the merged delta of one tensor, ``(*shape)`` in fp32 on the deltas' device.

        Args:
            name: of the tensor, on disk.
            deltas: of all experts.
        """


class MatrixSolver(Solver):
    """Shared by solvers that work on matrices: tensors of two dimensions or more, seen as the first by all the others.

    Tensors of fewer dimensions, such as biases and scales of norms, are summed and multiplied by ``vector_scale``.

    Args:
        vector_scale: factor of the sum of what is no matrix; None for 1 / experts, the average, as the papers have it.

    Raises:
        ConfigError: the factor is not finite.
    """

    def __init__(self, vector_scale: float | None = None) -> None:
        if vector_scale is not None:
            finite(self, vector_scale=vector_scale)
        self.vector_scale = vector_scale

    def solve(self, name: str, deltas: Deltas) -> Tensor:
        """Returns the merged delta of one tensor, ``(*shape)`` in fp32."""
        if len(deltas.shape) < 2 or deltas.shape.numel() == 0:
            return scaled_sum(deltas, self.vector_scale)
        return self.merged(list(matrices(deltas))).reshape(deltas.shape)

    @abstractmethod
    def merged(self, experts: list[Matrix]) -> Tensor:
        """Returns the merged delta of one matrix, ``(rows, columns)`` in fp32, from those of all experts."""


def scaled_sum(deltas: Deltas, scale: float | None) -> Tensor:
    """Returns ``scale * sum_k tau_k``, ``(*shape)`` in fp32.

    Args:
        deltas: of one tensor.
        scale: None for 1 / experts.
    """
    total = torch.zeros(deltas.shape.numel(), dtype=torch.float32, device=deltas.device)
    count = 0
    for rows in deltas.widened(torch.float32):
        for row in rows:
            total.add_(row)
        count += len(rows)
    return total.mul_(1 / count if scale is None else scale).view(deltas.shape)


def finite(solver: Solver, **numbers: float) -> None:
    """Refuses constructor arguments that are no finite numbers.

    Args:
        solver: whose they are.
        numbers: by their names.

    Raises:
        ConfigError: one is not.
    """
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ConfigError(f"{type(solver).__name__}: {name} must be a finite number, got {number}")
