"""Deltas of one tensor, all experts: summed with their coefficients, and contracted with a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from adamerge.deltas.groups import Groups
from adamerge.deltas.row_buffers import room
from adamerge.deltas.span_sums import SpanSums
from adamerge.deltas.tuning import PIECE, STORED_PIECE
from adamerge.precision import exact


class Deltas(ABC):
    """What each expert changed in one tensor: ``tau_k``, conceptually ``(experts, *shape)``, in fp32 when read.

    A part of the tensor is a slice of its flattened elements that is asked for; pieces are consecutive slices of a part
    that sums go through one after the other, so that what is added up stays in a processor's cache.

    Attributes:
        shape: of the tensor itself.
        device: where sums are computed.
        divisible: whether a part is read for no more than its share of the cost of the whole.
        piece: elements of a piece.
    """

    shape: torch.Size
    device: torch.device
    divisible: bool = False
    piece: int = PIECE

    @abstractmethod
    def row_batches(self, dtype: torch.dtype, part: slice | None = None) -> Iterator[Tensor]:
        """Yields the deltas of a few experts at a time, ``(t, elements of the part)``, in the order of the experts.

        A batch may change once the next one is asked for.

        Args:
            dtype: of the rows, or narrower where they are stored so.
            part: all when None.
        """

    def widened(self, dtype: torch.dtype, part: slice | None = None) -> Iterator[Tensor]:
        """Yields the same batches as ``row_batches``, all of that dtype."""
        for rows in self.row_batches(dtype, part):
            yield rows.to(dtype)

    def in_memory(self, store: Callable[[Deltas, int], Deltas], count: int) -> Deltas:
        """Returns the same deltas, read once and stored in memory.

        Args:
            store: gives the stored deltas of dense ones and their number of experts.
            count: experts.
        """
        return store(self, count)

    def elements(self, count: int) -> tuple[int, int]:
        """Returns how many numbers ``count`` experts' deltas consist of: dense ones, and those of factors; reads nothing."""
        return count * self.shape.numel(), 0

    def terms(self, count: int) -> list[int | None]:
        """Returns of how many products ``u v^T`` each of ``count`` experts' deltas is a sum; None where it is dense."""
        return [None] * count

    def mapped(self, matrix: Tensor) -> Deltas:
        """Returns sums of these deltas as those of new experts: ``matrix`` (new experts, experts), on the CPU."""
        return TransformedDeltas(self, lambda rows, _: matrix.to(rows, non_blocking=True) @ rows, local=True)

    def opened(self) -> Deltas:
        """Returns the same deltas, to be read several times in a row: files are opened once."""
        return self

    def pieces(self, part: slice | None = None, size: int | None = None) -> list[slice]:
        """Returns the pieces of a part, in order; one alone where a piece costs as much to read as the whole tensor.

        Args:
            part: all when None.
            size: elements of a piece; what suits these deltas when None.
        """
        part, size = self.whole if part is None else part, self.piece if size is None else size
        # a device has no use for small operations
        if not self.divisible or self.device.type != "cpu" or part.stop - part.start <= size:
            return [part]
        return [slice(at, min(at + size, part.stop)) for at in range(part.start, part.stop, size)]

    def in_pieces(self, part: slice | None = None, size: int | None = None) -> Iterator[tuple[slice, Deltas]]:
        """Yields each piece with the deltas to read it from, whose files are opened once for several pieces."""
        pieces = self.pieces(part, size)
        deltas = self if len(pieces) == 1 else self.opened()
        for piece in pieces:
            yield piece, deltas

    @property
    def whole(self) -> slice:
        """Returns the part of a tensor that is all of its elements."""
        return slice(0, self.shape.numel())

    def sums(
        self, coefficients: Tensor, groups: Groups, part: slice | None = None, size: int | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yields ``sum_k c[k, g] tau_k`` of a part, piece by piece: where in the part, and the flat values.

        Computed when asked for, in the dtype of the coefficients (fp32), outside autocast and without autograd.

        Args:
            coefficients: ``(experts, groups.count)``.
            groups: which elements use which.
            part: all when None.
            size: elements of a piece; what suits these deltas when None.
        """
        first = 0 if part is None else part.start
        for piece, deltas in self.in_pieces(part, size):
            with exact(deltas.device):
                values = deltas.summed(coefficients, groups, piece)
            yield slice(piece.start - first, piece.stop - first), values

    def summed(self, coefficients: Tensor, groups: Groups, part: slice | None = None) -> Tensor:
        """Returns ``sum_k c[k, g] tau_k`` of a part, flat and without autograd."""
        part = self.whole if part is None else part
        if len(self.pieces(part)) == 1:
            return self._sum(coefficients, groups, part)
        values = room([part.stop - part.start], coefficients.dtype, self.device)
        for piece, deltas in self.in_pieces(part):
            values[piece.start - part.start : piece.stop - part.start] = deltas._sum(coefficients, groups, piece)
        return values

    def _sum(self, coefficients: Tensor, groups: Groups, piece: slice) -> Tensor:
        shared = groups.within(piece, self.shape.numel(), self.device)
        batches = self.row_batches(coefficients.dtype, piece)
        rows = next(batches)
        first = len(rows)
        values = shared.sum(rows, coefficients[:first])
        for rows in batches:
            shared.accumulate(values, rows, coefficients[first : first + len(rows)])
            first += len(rows)
        return values

    def rows(self, dtype: torch.dtype, part: slice | None = None) -> Tensor:
        """Returns the deltas of all experts: ``(experts, elements of the part)``, a copy; the part is all when None."""
        batches = [rows.to(dtype, copy=True) for rows in self.row_batches(dtype, part)]
        return batches[0] if len(batches) == 1 else torch.cat(batches)

    def dense(self) -> Tensor:
        """Returns the deltas of all experts: ``(experts, *shape)`` in fp32."""
        rows = self.rows(torch.float32)
        return rows.view(len(rows), *self.shape)

    def combine(self, coefficients: Tensor, groups: Groups) -> Tensor:
        """Returns ``sum_k c[k, g(e)] tau_k[e]``, a tensor of ``shape``, for coefficients ``(experts, groups.count)``.

        Differentiable in the coefficients. Computed in their dtype (fp32), outside autocast.
        """
        combined: Tensor = _Combine.apply(coefficients, self, groups)
        return combined

    def contract(self, gradient: Tensor, groups: Groups, part: slice | None = None) -> Tensor:
        """Returns ``sum_{e in g} G[e] tau_k[e]``, ``(experts, groups.count)``, for the gradient ``G`` of a part.

        The transpose of ``combine`` and of ``sums``. Each piece's sums go to the coefficients that the piece touches; where
        several pieces touch the same ones, in float64, so that rounding does not grow with their number.
        """
        part, flat = self.whole if part is None else part, gradient.reshape(-1)
        spans = SpanSums(groups.count, one=len(self.pieces(part)) == 1, apart=groups.apart)
        for piece, deltas in self.in_pieces(part):
            shared = groups.within(piece, self.shape.numel(), gradient.device)
            own, first = flat[piece.start - part.start : piece.stop - part.start], 0
            for rows in deltas.widened(gradient.dtype, piece):
                spans.add(first, shared.touched, shared.contract(rows, own))
                first += len(rows)
        return spans.result(gradient.dtype)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, deltas: Deltas, groups: Groups) -> Tensor:
        ctx.deltas, ctx.groups = deltas, groups
        with exact(deltas.device):
            return deltas.summed(coefficients, groups).view(deltas.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        # contracted here, so autograd keeps no expert's copy of this tensor
        with exact(gradients[0].device):
            return ctx.deltas.contract(gradients[0], ctx.groups), None, None


class DenseDeltas(Deltas):
    """Deltas of one tensor that are stored as numbers, one an element.

    Args:
        values: ``(experts, *shape)``.
    """

    divisible = True
    piece = STORED_PIECE

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.shape, self.device = values.shape[1:], values.device

    def row_batches(self, dtype: torch.dtype, part: slice | None = None) -> Iterator[Tensor]:
        """Yields one batch with the rows of every expert."""
        rows = self.values.reshape(len(self.values), self.shape.numel())
        yield (rows if part is None else rows[:, part]).to(dtype)


class TransformedDeltas(Deltas):
    """Deltas that a function of all experts' deltas changes at each read.

    Args:
        inner: the deltas as they are.
        transform: from ``(experts, n)`` in fp32, a copy that it may change, and the part of the flattened tensor that these
            elements are, to the new experts' ``(experts, n)``.
        local: whether each element's new deltas depend on that element's deltas alone, so that n may be a part's.
    """

    def __init__(self, inner: Deltas, transform: Callable[[Tensor, slice], Tensor], local: bool = False) -> None:
        self.inner, self.transform, self.local = inner, transform, local
        self.shape, self.device, self.divisible = inner.shape, inner.device, local and inner.divisible

    def opened(self) -> Deltas:
        """Returns deltas that change the opened ones in the same way."""
        return TransformedDeltas(self.inner.opened(), self.transform, self.local)

    def row_batches(self, dtype: torch.dtype, part: slice | None = None) -> Iterator[Tensor]:
        """Yields one batch with the rows of every expert, since such functions look across experts."""
        read = part if self.local and part is not None else self.whole
        # always from fp32: thresholds are of fp32 magnitudes, whatever dtype the caller computes in
        rows = self.transform(self.inner.rows(torch.float32, read), read).to(dtype)
        yield rows if part is None or self.local else rows[:, part]
