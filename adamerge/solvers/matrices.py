"""An expert's delta of one tensor as a matrix, whole or as a product of factors, with what formulas ask of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adamerge.checkpoints.lora_factors import matrix_shape
from adamerge.deltas.base import Deltas
from adamerge.deltas.low_rank import JoinedDeltas, LowRankDeltas

Decomposition = tuple[Tensor, Tensor, Tensor]
"""``u`` (rows, n), ``s`` (n,) descending and positive, ``vt`` (n, columns): what they multiply to is the matrix."""


class Matrix(ABC):
    """``tau``, ``(rows, columns)``, in fp32."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Returns ``tau`` itself."""

    @abstractmethod
    def square_norm(self) -> Tensor:
        """Returns ``||tau||_F^2``, a number in fp64."""

    @abstractmethod
    def gram(self) -> Tensor:
        """Returns ``tau^T tau``, ``(columns, columns)``."""

    @abstractmethod
    def cubed(self) -> Tensor:
        """Returns ``tau tau^T tau``, ``(rows, columns)``."""

    @abstractmethod
    def outside(self, basis: Tensor) -> Matrix:
        """Returns ``tau - basis basis^T tau``, what of the columns is outside the span of orthonormal ones, ``(rows, n)``."""

    @abstractmethod
    def all_components(self) -> Decomposition:
        """Returns all singular values and their vectors, ``min(rows, columns)`` or as many as there can be."""

    def decomposed(self, of: Tensor | None = None) -> Decomposition:
        """Returns the singular values that are more than rounding, and their vectors.

        Args:
            of: norm of what the matrix is a rest of, whose rounding it has; its own largest singular value when None.
        """
        return without_rounding(self.all_components(), of)


@dataclass(frozen=True)
class Whole(Matrix):
    """A matrix that is stored as numbers, one an element.

    Attributes:
        values: ``(rows, columns)``.
    """

    values: Tensor

    def dense(self) -> Tensor:
        """Returns ``tau`` itself."""
        return self.values

    def square_norm(self) -> Tensor:
        """Returns ``||tau||_F^2``, a number in fp64."""
        return self.values.double().square().sum()

    def gram(self) -> Tensor:
        """Returns ``tau^T tau``, ``(columns, columns)``."""
        return self.values.T @ self.values

    def cubed(self) -> Tensor:
        """Returns ``tau tau^T tau``, the smaller of the two inner products first."""
        rows, columns = self.values.shape
        return (
            (self.values @ self.values.T) @ self.values
            if rows < columns
            else self.values @ (self.values.T @ self.values)
        )

    def outside(self, basis: Tensor) -> Matrix:
        """Returns ``tau - basis basis^T tau``."""
        return Whole(self.values - basis @ (basis.T @ self.values))

    def all_components(self) -> Decomposition:
        """Returns all singular values and their vectors, ``min(rows, columns)`` of them."""
        u, s, vt = torch.linalg.svd(self.values, full_matrices=False)
        return u, s, vt


@dataclass(frozen=True)
class Product(Matrix):
    """A matrix as a product of two thin ones, as LoRA has it; never multiplied out for a norm or a decomposition.

    Attributes:
        left: ``(rows, rank)``.
        right: ``(rank, columns)``.
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """Returns ``tau`` itself."""
        return self.left @ self.right

    def square_norm(self) -> Tensor:
        """Returns ``||tau||_F^2 = sum((L^T L) * (R R^T))``, a number in fp64."""
        left, right = self.left.double(), self.right.double()
        return ((left.T @ left) * (right @ right.T)).sum()

    def gram(self) -> Tensor:
        """Returns ``R^T (L^T L) R``, ``(columns, columns)``."""
        return self.right.T @ ((self.left.T @ self.left) @ self.right)

    def cubed(self) -> Tensor:
        """Returns ``L (R R^T) (L^T L) R``, ``(rows, columns)``."""
        return (self.left @ ((self.right @ self.right.T) @ (self.left.T @ self.left))) @ self.right

    def outside(self, basis: Tensor) -> Matrix:
        """Returns ``(L - basis basis^T L) R``."""
        return Product(self.left - basis @ (basis.T @ self.left), self.right)

    def all_components(self) -> Decomposition:
        """Returns as many singular values as the rank, by those of the small matrix between the factors' orthogonal parts."""
        (left, inner), (right, outer) = torch.linalg.qr(self.left), torch.linalg.qr(self.right.T)
        u, s, vt = torch.linalg.svd(inner @ outer.T, full_matrices=False)
        return left @ u, s, vt @ right.T


def matrices(deltas: Deltas) -> Iterator[Matrix]:
    """Yields each expert's delta of one tensor as a matrix; factors stay factors."""
    if isinstance(deltas, JoinedDeltas):
        for _, kind in deltas.kinds:
            yield from matrices(kind)
    elif isinstance(deltas, LowRankDeltas):
        left, right = deltas.read()
        for row in deltas.weights:
            own = row.nonzero().flatten()
            there = own.to(left.device)
            yield Product(left[:, there] * row[own].to(left), right[there])
    else:
        for rows in deltas.row_batches(torch.float32):
            for row in rows.to(torch.float32, copy=True):
                yield Whole(row.view(matrix_shape(deltas.shape)))


def summed(experts: Sequence[Matrix]) -> Matrix:
    """Returns the sum of matrices; that of thin products is one, as long as it is thinner than the matrix."""
    products = [one for one in experts if isinstance(one, Product)]
    if len(products) == len(experts):
        left = torch.cat([one.left for one in products], dim=1)
        right = torch.cat([one.right for one in products])
        if left.shape[1] < min(len(left), right.shape[1]):
            return Product(left, right)
    total = experts[0].dense().clone()
    for one in experts[1:]:
        total += one.dense()
    return Whole(total)


def without_rounding(decomposition: Decomposition, of: Tensor | None = None) -> Decomposition:
    """Returns a decomposition without the components whose singular value is nothing but rounding.

    The vectors of these are arbitrary, and formulas that give all components the same weight would add them.

    Args:
        decomposition: of a matrix.
        of: norm of what the matrix is a rest of; its own largest singular value when None.
    """
    u, s, vt = decomposition
    count = int(weighty(decomposition, of).sum())
    return u[:, :count], s[:count], vt[:count]


def weighty(decomposition: Decomposition, of: Tensor | None = None) -> Tensor:
    """Returns which singular values are more than the rounding of a matrix with such a largest one, ``(n,)``."""
    u, s, vt = decomposition
    size = max(u.shape[0], vt.shape[1])
    return (s > (s[:1] if of is None else of) * size * torch.finfo(s.dtype).eps) & (s > 0)


def orthogonal(matrix: Tensor) -> Tensor:
    """Returns the nearest matrix with orthonormal columns, or rows where these are fewer: ``P Q^T`` of ``P S Q^T``.

    It solves the orthogonal Procrustes problem, by which Task Singular Vectors and Iso-CTS decorrelate vectors. Where these
    depend on one another, such as those of thin factors, only what they span is kept: the rest would be arbitrary.
    """
    p, _, qt = without_rounding(torch.linalg.svd(matrix, full_matrices=False))
    return p @ qt
