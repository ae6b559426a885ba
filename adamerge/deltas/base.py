"""Deltas of one tensor, all experts: combined by coefficients, and contracted with a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from adamerge.deltas.groups import Groups
from adamerge.deltas.row_buffers import room
from adamerge.precision import exact

PIECE = 1 << 19
"""Elements of a piece: sums go through a tensor piece by piece, so that what is added up stays in a processor's cache."""

STORED_PIECE = 1 << 22
"""The same where rows are added from where they are, and the sum alone is in that cache."""


class Deltas(ABC):
    """What each expert changed in one tensor: ``tau_k``, conceptually ``(experts, *shape)``, in fp32 when read.

    A part of the tensor is a slice of its flattened elements.

    Attributes:
        shape: of the tensor itself.
        device: where combinations are computed.
        divisible: whether a part is read for no more than its share of the cost of the whole.
        piece: elements of a piece.
    """

    shape: torch.Size
    device: torch.device
    divisible: bool = False
    piece: int = PIECE

    @abstractmethod
    def blocks(self, dtype: torch.dtype, part: slice | None = None) -> Iterator[Tensor]:
        """The deltas as consecutive ``(t, elements of the part)`` blocks of experts, one block in memory at a time.

        Args:
            dtype: of the blocks, or narrower where they are kept so.
            part: all when None.

        A block may change once the next one is asked for.
        """

    def widened(self, dtype: torch.dtype, part: slice | None = None) -> Iterator[Tensor]:
        """The same blocks, all of that dtype."""
        for rows in self.blocks(dtype, part):
            yield rows.to(dtype)

    def kept(self, keep: Callable[[Deltas, int], Deltas], count: int) -> Deltas:
        """The same deltas, read once and kept in memory.

        Args:
            keep: gives the kept deltas of dense ones and their number of experts.
            count: experts.
        """
        return keep(self, count)

    def elements(self, count: int) -> tuple[int, int]:
        """Numbers that ``count`` experts' deltas consist of: dense ones, and those of factors; nothing is read."""
        return count * self.shape.numel(), 0

    def mapped(self, matrix: Tensor) -> Deltas:
        """Sums of these deltas: ``matrix`` (new experts, experts), on the CPU."""
        return TransformedDeltas(self, lambda rows: matrix.to(rows, non_blocking=True) @ rows, local=True)

    def opened(self) -> Deltas:
        """The same, to be read several times in a row: files are opened once."""
        return self

    def within(self, part: slice) -> Deltas:
        """The deltas of a part, which take the groups of the whole tensor."""
        return PartOfDeltas(self, part)

    def pieces(self, part: slice | None = None, size: int | None = None) -> list[slice]:
        """How one goes through the tensor, or a part of it: consecutive parts; one where a part costs what the whole does.

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
        """Those pieces, each with the deltas to read it from: opened once for several."""
        pieces = self.pieces(part, size)
        deltas = self if len(pieces) == 1 else self.opened()
        for piece in pieces:
            yield piece, deltas

    @property
    def whole(self) -> slice:
        """All elements."""
        return slice(0, self.shape.numel())

    def summed(self, coefficients: Tensor, groups: Groups, part: slice | None = None) -> Tensor:
        """``sum_k c[k, g] tau_k`` of a part, flat and without autograd."""
        part = self.whole if part is None else part
        if len(self.pieces(part)) == 1:
            return self._sum(coefficients, groups, part)
        found = room([part.stop - part.start], coefficients.dtype, self.device)
        for piece, deltas in self.in_pieces(part):
            found[piece.start - part.start : piece.stop - part.start] = deltas._sum(coefficients, groups, piece)
        return found

    def _sum(self, coefficients: Tensor, groups: Groups, piece: slice) -> Tensor:
        shared = groups.within(piece, self.shape.numel(), self.device)
        blocks = self.blocks(coefficients.dtype, piece)
        rows = next(blocks)
        first = len(rows)
        found = shared.sum(rows, coefficients[:first])
        for rows in blocks:
            shared.accumulate(found, rows, coefficients[first : first + len(rows)])
            first += len(rows)
        return found

    def rows(self, dtype: torch.dtype, part: slice | None = None) -> Tensor:
        """All of them at once: ``(experts, elements of the part)``, a copy; the part is all when None."""
        blocks = [block.to(dtype, copy=True) for block in self.blocks(dtype, part)]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def dense(self) -> Tensor:
        """All of them at once: ``(experts, *shape)`` in fp32."""
        rows = self.rows(torch.float32)
        return rows.view(len(rows), *self.shape)

    def combine(self, coefficients: Tensor, groups: Groups) -> Tensor:
        """``sum_k c[k, g(e)] tau_k[e]``: coefficients ``(experts, groups.count)`` to a tensor of ``shape``.

        Differentiable in the coefficients. Computed in their dtype (fp32), outside autocast.
        """
        combined: Tensor = _Combine.apply(coefficients, self, groups)
        return combined

    def contract(self, gradient: Tensor, groups: Groups, part: slice | None = None) -> Tensor:
        """The transpose of ``combine``: the gradient of a part to ``(experts, groups.count)``.

        The pieces' sums are summed in float64, so that rounding does not grow with their number.
        """
        part, flat, found = self.whole if part is None else part, gradient.reshape(-1), []
        for piece, deltas in self.in_pieces(part):
            shared = groups.within(piece, self.shape.numel(), gradient.device)
            own = flat[piece.start - part.start : piece.stop - part.start]
            blocks = [shared.contract(rows, own) for rows in deltas.widened(gradient.dtype, piece)]
            found.append(blocks[0] if len(blocks) == 1 else torch.cat(blocks))
        return found[0] if len(found) == 1 else torch.stack(found).sum(dim=0, dtype=torch.float64).to(gradient.dtype)


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


class PartOfDeltas(Deltas):
    """A part of a tensor's deltas, summed and contracted by the groups of the whole tensor.

    Args:
        of: the deltas of the tensor.
        part: of it.
    """

    def __init__(self, of: Deltas, part: slice) -> None:
        self.of, self.part = of, part
        self.shape, self.device = torch.Size([part.stop - part.start]), of.device
        self.divisible, self.piece = of.divisible, of.piece

    def blocks(self, dtype: torch.dtype, part: slice | None = None) -> Iterator[Tensor]:
        """Those of the part."""
        return self.of.blocks(dtype, self._there(part))

    def opened(self) -> Deltas:
        """The part of the opened ones."""
        return PartOfDeltas(self.of.opened(), self.part)

    def within(self, part: slice) -> Deltas:
        """A part of the part."""
        return PartOfDeltas(self.of, self._there(part))

    def summed(self, coefficients: Tensor, groups: Groups, part: slice | None = None) -> Tensor:
        """Of that part of the tensor."""
        return self.of.summed(coefficients, groups, self._there(part))

    def contract(self, gradient: Tensor, groups: Groups, part: slice | None = None) -> Tensor:
        """Of that part of the tensor."""
        return self.of.contract(gradient, groups, self._there(part))

    def _there(self, part: slice | None) -> slice:
        first = self.part.start
        return self.part if part is None else slice(first + part.start, first + part.stop)


class DenseDeltas(Deltas):
    """Stored deltas.

    Args:
        values: ``(experts, *shape)``.
    """

    divisible = True
    piece = STORED_PIECE

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.shape, self.device = values.shape[1:], values.device

    def blocks(self, dtype: torch.dtype, part: slice | None = None) -> Iterator[Tensor]:
        """One block with every expert."""
        rows = self.values.reshape(len(self.values), self.shape.numel())
        yield (rows if part is None else rows[:, part]).to(dtype)


class TransformedDeltas(Deltas):
    """Deltas that a function of all experts' deltas changes at each read.

    Args:
        inner: the deltas as they are.
        transform: ``(experts, n)`` in fp32 to the new experts' ``(experts, n)``.
        local: whether each element's new deltas depend on that element's deltas alone, so that n may be a part's.
    """

    def __init__(self, inner: Deltas, transform: Callable[[Tensor], Tensor], local: bool = False) -> None:
        self.inner, self.transform, self.local = inner, transform, local
        self.shape, self.device, self.divisible = inner.shape, inner.device, local and inner.divisible

    def opened(self) -> Deltas:
        """The same of the opened ones."""
        return TransformedDeltas(self.inner.opened(), self.transform, self.local)

    def blocks(self, dtype: torch.dtype, part: slice | None = None) -> Iterator[Tensor]:
        """One block with every expert: such functions look across experts."""
        read = part if self.local else None
        # always from fp32: thresholds are of fp32 magnitudes, whatever dtype the caller computes in
        rows = self.transform(self.inner.rows(torch.float32, read)).to(dtype)
        yield rows if part is None or self.local else rows[:, part]
