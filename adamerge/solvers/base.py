"""The contracts of what writes task vectors before anything is learned; a solver makes one delta of all experts' deltas."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from adamerge.deltas.base import Deltas
from adamerge.errors import ConfigError
from adamerge.solvers.matrices import Matrix, matrices
from adamerge.task_vectors.task_vectors import TaskVectors


class TaskVectorWriter(ABC):
    """Makes new task vectors of the experts', tensor by tensor; its constructor's arguments are its attributes.

    The same deltas give the same bits on the same machine with the same threads, in whatever order tensors are solved.

    Attributes:
        file: what the file is called, without its ending.
        single: whether it makes one task vector of all, or several.
        sees_inputs: whether it needs unlabelled samples, as a ``SequentialSolver`` does; else weights are all it sees.
    """

    file: str
    single: bool
    sees_inputs: ClassVar[bool] = False

    @abstractmethod
    def entries(self, name: str, vectors: TaskVectors) -> dict[str, torch.Size]:
        """Returns what the file has of one tensor: keys to shapes, from headers alone.

        Args:
            name: of the tensor, on disk.
            vectors: base and experts.
        """

    @abstractmethod
    def tensors(self, name: str, vectors: TaskVectors) -> Iterator[Tensor]:
        """Yields what the file has of one tensor, in the order of ``entries``, in fp32 on the vectors' device.

        Args:
            name: of the tensor, on disk.
            vectors: base and experts.
        """


class Solver(TaskVectorWriter):
    """Makes one merged task vector of several, tensor by tensor."""

    file, single = "merged", True

    def entries(self, name: str, vectors: TaskVectors) -> dict[str, torch.Size]:
        """Returns the tensor's own name and shape."""
        return {name: vectors.shape(name)}

    def tensors(self, name: str, vectors: TaskVectors) -> Iterator[Tensor]:
        """Yields the merged delta of one tensor."""
        yield self.solve(name, vectors)

    @abstractmethod
    def solve(self, name: str, vectors: TaskVectors) -> Tensor:
        """Returns the merged delta of one tensor, ``(*shape)`` in fp32 on the vectors' device.

        Args:
            name: of the tensor, on disk.
            vectors: base and experts; ``vectors[name]`` has the deltas of all experts.
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

    def solve(self, name: str, vectors: TaskVectors) -> Tensor:
        """Returns the merged delta of one tensor, ``(*shape)`` in fp32."""
        deltas = vectors[name]
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


def finite(solver: TaskVectorWriter, **numbers: float) -> None:
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
