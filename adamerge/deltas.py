"""Deltas of one tensor, all experts: combined by coefficients, and contracted with a gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

RUN = 1 << 15
"""Elements whose products one call of the linear algebra library sums."""

SEGMENT = 1 << 12
"""Elements, at least, whose products are summed in one run where they are summed one after the other."""


class Groups(ABC):
    """Which elements of one tensor share a coefficient: ``g`` of theta0[e] + sum_k w[k, g(e)] tau_k[e]."""

    count: int
    """Coefficients of one expert for this tensor."""

    def placed(self, device: torch.device) -> Groups:
        """The same groups, ready for one pass over the experts on ``device``."""
        return self

    @abstractmethod
    def within(self, start: int, stop: int, numel: int) -> Groups:
        """The groups of the elements ``start`` to ``stop`` of a tensor of ``numel``, of the same ``count``."""

    @abstractmethod
    def accumulate(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        """``out += sum_t coefficients[t, g] * rows[t]``, in place; out (n,), rows (t, n), coefficients (t, count).

        ``rows`` may be of a narrower dtype; sums and products are in that of ``out``, here and below that of ``gradient``.
        """

    @abstractmethod
    def contract(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """Sum of ``gradient * rows[t]`` over the elements of each group; (t, n) and (n,) to (t, count)."""


class Whole(Groups):
    """All elements of the tensor share one coefficient."""

    count = 1

    def within(self, start: int, stop: int, numel: int) -> Groups:
        """The same."""
        return self

    def accumulate(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        """``out += coefficients[:, 0] @ rows``."""
        _add_rows(out, rows, coefficients[:, 0])

    def contract(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """``rows @ gradient``."""
        return _dots(rows, gradient).unsqueeze(1)


class Chunks(Groups):
    """Contiguous runs of the flattened tensor, sizes differing by one at most, so that none is ever empty.

    Args:
        count: chunks of a tensor; at most its number of elements.

    Reference: Expert Merging (2025), https://arxiv.org/abs/2509.25712, section on layer-chunked coefficients.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def slices(self, numel: int) -> list[slice]:
        """The ``count`` runs of a tensor of ``numel`` elements."""
        edges = [i * numel // self.count for i in range(self.count + 1)]
        return [slice(a, b) for a, b in pairwise(edges)]

    def within(self, start: int, stop: int, numel: int) -> Groups:
        """The chunks that lie there, cut at both ends."""
        first = ((start + 1) * self.count - 1) // numel  # the last whose edge is not after `start`
        last = (stop * self.count - 1) // numel + 1
        edges = [i * numel // self.count for i in range(first, last + 1)]
        slices = [slice(max(a, start) - start, min(b, stop) - start) for a, b in pairwise(edges)]
        return _CutChunks(self.count, first, slices)

    def accumulate(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        """One product per chunk."""
        for group, chunk in enumerate(self.slices(out.numel())):
            _add_rows(out[chunk], rows[:, chunk], coefficients[:, group])

    def contract(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """One product per chunk."""
        chunks = self.slices(gradient.numel())
        return torch.stack([_dots(rows[:, chunk], gradient[chunk]) for chunk in chunks], dim=1)


def _add_rows(out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
    """``out += coefficients @ rows``; rows of another dtype are widened inside the sum, and never in memory all at once."""
    if rows.dtype == out.dtype:
        out.addmv_(rows.t(), coefficients)
        return
    for row, coefficient in zip(rows, coefficients, strict=True):
        out.addcmul_(row, coefficient)


class _CutChunks(Groups):
    def __init__(self, count: int, first: int, slices: Sequence[slice]) -> None:
        self.count, self.first, self.slices = count, first, slices

    def within(self, start: int, stop: int, numel: int) -> Groups:
        raise NotImplementedError("a piece of a tensor is cut no further")

    def accumulate(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        for group, chunk in enumerate(self.slices, self.first):
            out[chunk].addmv_(rows[:, chunk].t(), coefficients[:, group])

    def contract(self, rows: Tensor, gradient: Tensor) -> Tensor:
        found = torch.zeros(len(rows), self.count, dtype=gradient.dtype, device=gradient.device)
        for group, chunk in enumerate(self.slices, self.first):
            found[:, group] = _dots(rows[:, chunk], gradient[chunk])
        return found


def _dots(rows: Tensor, gradient: Tensor) -> Tensor:
    """``rows @ gradient``; on a CPU run by run: one running sum over a whole matrix would be off by up to a part in 1e4."""
    run = RUN if rows.device.type == "cpu" else max(gradient.numel(), 1)
    pairs = zip(rows.split(run, dim=1), gradient.split(run), strict=True)
    return torch.stack([torch.mv(row.to(gradient.dtype), own) for row, own in pairs]).sum(dim=0)


class Ids(Groups):
    """Any elements: an integer for each says which coefficient it uses.

    Args:
        count: coefficients of an expert.
        make: gives the ids, ``(numel,)``, each in [0, count); made when needed, and kept from the first contraction on.
    """

    def __init__(self, count: int, make: Callable[[], Tensor]) -> None:
        self.count, self.make = count, make
        self.kept: Tensor | None = None

    def placed(self, device: torch.device) -> Groups:
        """The ids as indices on ``device``, for one pass over the experts."""
        ids = (self.make() if self.kept is None else self.kept).to(device)
        return _PlacedIds(self, ids, ids)

    def within(self, start: int, stop: int, numel: int) -> Groups:
        """The ids there."""
        return self.placed(torch.device("cpu")).within(start, stop, numel)

    def accumulate(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        """Each row times its elements' own coefficients."""
        self.placed(out.device).accumulate(out, rows, coefficients)

    def contract(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """Sums of products by id."""
        return self.placed(rows.device).contract(rows, gradient)


class _PlacedIds(Groups):
    def __init__(self, owner: Ids, ids: Tensor, whole: Tensor) -> None:
        self.count, self.owner, self.ids, self.whole = owner.count, owner, ids, whole

    @cached_property
    def indices(self) -> Tensor:
        return self.ids.long()

    def within(self, start: int, stop: int, numel: int) -> Groups:
        return _PlacedIds(self.owner, self.ids[start:stop], self.whole)

    def accumulate(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        for row, own in zip(rows, coefficients, strict=True):
            out.addcmul_(own.index_select(0, self.indices), row)

    def contract(self, rows: Tensor, gradient: Tensor) -> Tensor:
        self.owner.kept = self.whole
        # summed over runs and then over those, so that rounding does not grow with the tensor; a run's sums are few
        run = max(SEGMENT, 16 * self.count)
        runs = gradient.numel() // run
        whole = runs * run
        found = []
        for row in rows:
            products = row * gradient
            sums = torch.zeros(runs + 1, self.count, dtype=gradient.dtype, device=rows.device)
            sums[:-1].scatter_add_(1, self.indices[:whole].view(runs, run), products[:whole].view(runs, run))
            sums[-1].scatter_add_(0, self.indices[whole:], products[whole:])
            found.append(sums.sum(dim=0))
        return torch.stack(found)


class Deltas(ABC):
    """What each expert changed in one tensor: ``tau_k``, conceptually ``(experts, *shape)``, in fp32 when read.

    Attributes:
        shape: of the tensor itself.
        device: where combinations are computed.
    """

    shape: torch.Size
    device: torch.device

    @abstractmethod
    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The deltas as consecutive ``(t, numel)`` blocks of experts, no more of them in memory than one block.

        Of ``dtype``, or narrower where they are kept so. A block may change once the next one is asked for.
        """

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
        return TransformedDeltas(self, lambda rows: matrix.to(rows) @ rows)

    def within(self, part: slice) -> Deltas:
        """The deltas of a part of the flattened tensor, whose ``combine`` takes groups of the whole one."""
        return PartOfDeltas(self, self, part)

    def accumulate(self, out: Tensor, coefficients: Tensor, groups: Groups) -> None:
        """``out += sum_k c[k, g] tau_k``, in place and without autograd; out ``(numel,)``."""
        groups, first = groups.placed(out.device), 0
        for block in self.blocks(coefficients.dtype):
            groups.accumulate(out, block, coefficients[first : first + len(block)])
            first += len(block)

    def summed(self, coefficients: Tensor, groups: Groups) -> Tensor:
        """``sum_k c[k, g] tau_k``, flat and without autograd: ``(numel,)``."""
        out = torch.zeros(self.shape.numel(), dtype=coefficients.dtype, device=self.device)
        self.accumulate(out, coefficients, groups)
        return out

    def dense(self) -> Tensor:
        """All of them at once: ``(experts, *shape)`` in fp32."""
        rows = torch.cat(list(self.blocks(torch.float32)))
        return rows.view(len(rows), *self.shape)

    def combine(self, coefficients: Tensor, groups: Groups) -> Tensor:
        """``sum_k c[k, g(e)] tau_k[e]``: coefficients ``(experts, groups.count)`` to a tensor of ``shape``.

        Differentiable in the coefficients. Computed in their dtype (fp32), outside autocast.
        """
        combined: Tensor = _Combine.apply(coefficients, self, groups)
        return combined

    def pieces(self, coefficients: Tensor, groups: Groups) -> Iterator[Tensor]:
        """What ``combine`` gives, bit for bit, in consecutive pieces of the flattened tensor; without autograd.

        One piece, the whole, unless the deltas can be read in parts.
        """
        with torch.no_grad():
            combined = self.combine(coefficients, groups)
        yield combined.reshape(-1)

    def contract(self, gradient: Tensor, groups: Groups) -> Tensor:
        """The transpose of ``combine``: a gradient of ``shape`` to ``(experts, groups.count)``."""
        flat, groups = gradient.reshape(-1), groups.placed(gradient.device)
        return torch.cat([groups.contract(block, flat) for block in self.blocks(gradient.dtype)])


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, deltas: Deltas, groups: Groups) -> Tensor:
        ctx.deltas, ctx.groups = deltas, groups
        with torch.autocast(deltas.device.type, enabled=False):
            return deltas.summed(coefficients, groups).view(deltas.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        # contracted here, so autograd keeps no expert's copy of this tensor
        with torch.autocast(gradients[0].device.type, enabled=False):
            return ctx.deltas.contract(gradients[0], ctx.groups), None, None


class PartOfDeltas(Deltas):
    """A part of the flattened deltas of a tensor.

    Args:
        whole: of the tensor.
        inner: the same, or deltas that are of this part alone and cheaper to read.
        part: of the flattened tensor.
    """

    def __init__(self, whole: Deltas, inner: Deltas, part: slice) -> None:
        self.whole, self.inner, self.part = whole, inner, part
        self.shape, self.device = torch.Size([part.stop - part.start]), whole.device

    def within(self, part: slice) -> Deltas:
        """A part of the part."""
        first = self.part.start
        return self.whole.within(slice(first + part.start, first + part.stop))

    def combine(self, coefficients: Tensor, groups: Groups) -> Tensor:
        """With the groups that this part has of the whole tensor's; coefficients ``(experts, groups.count)``."""
        return super().combine(coefficients, groups.within(self.part.start, self.part.stop, self.whole.shape.numel()))

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The part of each block."""
        for block in self.inner.blocks(dtype):
            yield block if self.inner is not self.whole else block[:, self.part]


class DenseDeltas(Deltas):
    """Stored deltas.

    Args:
        values: ``(experts, *shape)``.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.shape, self.device = values.shape[1:], values.device

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """One block with every expert."""
        yield self.values.reshape(len(self.values), self.shape.numel()).to(dtype)


class TransformedDeltas(Deltas):
    """Deltas that a function of all experts' deltas changes at each read.

    Args:
        inner: the deltas as they are.
        transform: ``(experts, numel)`` in fp32 to the same shape.
    """

    def __init__(self, inner: Deltas, transform: Callable[[Tensor], Tensor]) -> None:
        self.inner, self.transform = inner, transform
        self.shape, self.device = inner.shape, inner.device

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """One block with every expert: such functions look across experts."""
        # always from fp32: thresholds are of fp32 magnitudes, whatever dtype the caller computes in
        yield self.transform(torch.cat(list(self.inner.blocks(torch.float32)))).to(dtype)
