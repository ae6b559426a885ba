"""Factors: a low-rank change of one tensor, scale * left @ right, that is read only when it is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.precision import exact


@dataclass(frozen=True)
class Factors:
    """``scale * left() @ right()``, of a tensor seen as a matrix: its first dimension by all the others.

    Attributes:
        rank: columns of ``left``; 0 is no change at all.
        scale: factor of the product.
        left: reads ``(rows, rank)``.
        right: reads ``(rank, columns)``.
    """

    rank: int
    scale: float
    left: Callable[[], Tensor]
    right: Callable[[], Tensor]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns ``scale * left @ right``, the dense update of the tensor, ``(rows, columns)``."""
        left, right = self.left().to(dtype), self.right().to(dtype)
        with exact(left.device):
            return (left * self.scale) @ right

    def equals(self, other: Factors) -> bool:
        """Whether scale and both factors are the same numbers; equal products of other factors are not noticed."""
        if (self.rank, self.scale) != (other.rank, other.scale):
            return False
        return torch.equal(self.left(), other.left()) and torch.equal(self.right(), other.right())


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a tensor of ``shape`` seen as a matrix; what has one dimension at most is one row."""
    return (shape[0], shape[1:].numel()) if len(shape) > 1 else (1, shape.numel())


def no_change(shape: torch.Size) -> Factors:
    """Factors of rank 0 for a tensor of ``shape``."""
    rows, columns = matrix_shape(shape)
    return Factors(0, 1.0, lambda: torch.zeros(rows, 0), lambda: torch.zeros(0, columns))
