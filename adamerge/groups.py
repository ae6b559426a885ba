"""Groups: which elements of one tensor share a coefficient, ``g`` of theta0[e] + sum_k w[k, g(e)] tau_k[e]."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

FEW = 4
"""Rows that one call of the linear algebra library adds up."""

RUN = 1 << 12
"""Elements whose products with several rows the linear algebra library sums at a time."""

LONG_RUN = 1 << 19
"""The same for one row, of which it keeps more sums."""

VECTOR = 16
"""Bytes of the vectors in which it sums those."""

SEGMENT = 1 << 12
"""Elements, at least, whose products are summed in one run where they are summed one after the other."""


class Groups(ABC):
    """How the elements of one tensor share the coefficients that each expert has for it."""

    count: int
    """Coefficients of one expert for this tensor."""

    @abstractmethod
    def within(self, part: slice, numel: int, device: torch.device) -> Shared:
        """How they are shared in one part of the flattened tensor of ``numel`` elements, for sums on ``device``."""

    def kept(self, numel: int) -> int:
        """Bytes that are kept from the first contraction of a tensor of ``numel`` elements on."""
        return 0


class Shared(ABC):
    """Which elements of a part of a tensor use which coefficients; ``n`` elements, ``count`` coefficients an expert."""

    @abstractmethod
    def fill(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        """``out = sum_t coefficients[t, g] * rows[t]``, in place; out (n,), rows (t, n), coefficients (t, count).

        Rows may be of a narrower dtype, here and below; all is computed in that of the coefficients or the gradient.
        """

    @abstractmethod
    def accumulate(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        """The same, onto what is there."""

    @abstractmethod
    def contract(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """Sum of ``gradient * rows[t]`` over the elements of each group; (t, n) and (n,) to (t, count)."""


class Whole(Groups):
    """All elements of the tensor share one coefficient."""

    count = 1

    def within(self, part: slice, numel: int, device: torch.device) -> Shared:
        """The one coefficient."""
        return _Runs(1, 0, [slice(0, part.stop - part.start)])


class Chunks(Groups):
    """Contiguous runs of the flattened tensor, sizes differing by one at most, so that none is ever empty.

    Args:
        count: chunks of a tensor; at most its number of elements.

    Reference: Expert Merging (2025), https://arxiv.org/abs/2509.25712, section on layer-chunked coefficients.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def within(self, part: slice, numel: int, device: torch.device) -> Shared:
        """The chunks that lie there, cut at both ends."""
        if part.start == part.stop:
            return _Runs(self.count, 0, [])
        first = ((part.start + 1) * self.count - 1) // numel  # the last whose edge is not after the start
        last = (part.stop * self.count - 1) // numel + 1
        edges = [i * numel // self.count for i in range(first, last + 1)]
        slices = [slice(max(a, part.start) - part.start, min(b, part.stop) - part.start) for a, b in pairwise(edges)]
        return _Runs(self.count, first, slices)


class _Runs(Shared):
    """One coefficient for each of several runs of elements, from the ``first`` of ``count`` on."""

    def __init__(self, count: int, first: int, slices: Sequence[slice]) -> None:
        self.count, self.first, self.slices = count, first, slices

    def fill(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        for group, run in enumerate(self.slices, self.first):
            _sum_rows(out[run], rows[:, run], coefficients[:, group])

    def accumulate(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        for group, run in enumerate(self.slices, self.first):
            _add_rows(out[run], rows[:, run], coefficients[:, group])

    def contract(self, rows: Tensor, gradient: Tensor) -> Tensor:
        sums = [_dots(rows[:, run], gradient[run]) for run in self.slices]
        if len(sums) == self.count:
            return torch.stack(sums, dim=1)
        found = gradient.new_zeros(len(rows), self.count)
        for group, own in enumerate(sums, self.first):
            found[:, group] = own
        return found


def _sum_rows(out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
    """``out = coefficients @ rows``; rows of another dtype are widened inside the sum, and never in memory all at once."""
    few = _at_once(out, rows)
    if few:
        # the library has another way of adding with coefficients that do not lie side by side
        torch.mv(rows[:few].t(), coefficients[:few].contiguous(), out=out)
    else:
        few = 1
        # a number without a dimension would be rounded to the row's dtype
        torch.mul(rows[0], coefficients[:1], out=out)
    _add_rows(out, rows[few:], coefficients[few:])


def _add_rows(out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
    """The same, onto what is there."""
    few = _at_once(out, rows)
    if few:
        coefficients = coefficients.contiguous()
        for first in range(0, len(rows), few):
            out.addmv_(rows[first : first + few].t(), coefficients[first : first + few])
    else:
        for row, coefficient in zip(rows, coefficients, strict=True):
            out.addcmul_(row, coefficient)


def _at_once(out: Tensor, rows: Tensor) -> int:
    """Rows that one call of the linear algebra library adds; 0 where it is not used.

    On a CPU each element's sum is the same wherever a tensor is cut and whatever holds its rows: as one by one.
    """
    if rows.dtype != out.dtype:
        return 0
    if rows.device.type != "cpu":
        return max(1, len(rows))
    return FEW if _adds_one_by_one() else 0


@functools.cache
def _adds_one_by_one() -> bool:
    """Whether the CPU's library adds a few rows as if one by one, to the bit, wherever they are cut.

    One without fused multiply-add does not, nor does one that sums the rows first.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(FEW + 1, (1 << 16) + 3, generator=generator)
    coefficients = torch.randn(FEW, generator=generator)
    for first in range(3):
        for last in [*range(first, first + 40), values.shape[1]]:
            rows, found, wanted = values[1:, first:last], values[0, first:last].clone(), values[0, first:last].clone()
            found.addmv_(rows.t(), coefficients)
            for row, coefficient in zip(rows, coefficients, strict=True):
                wanted.addcmul_(row, coefficient)
            if not torch.equal(found, wanted):
                return False
    return True


def _dots(rows: Tensor, gradient: Tensor) -> Tensor:
    """``rows @ gradient``; on a CPU run by run: one running sum over a whole matrix would be off by up to a part in 1e4."""
    rows = rows.to(gradient.dtype)
    if rows.device.type != "cpu":
        return torch.mv(rows, gradient)
    if len(rows) == 1:
        return _dot(rows[0], gradient).view(1)
    whole = gradient.numel() // RUN * RUN
    rest = torch.mv(rows[:, whole:], gradient[whole:])
    if whole == 0:
        return rest
    runs = torch.bmm(gradient[:whole].view(-1, 1, RUN), rows[:, :whole].unflatten(1, (-1, RUN)).permute(1, 2, 0))
    return runs[:, 0].sum(dim=0, dtype=torch.float64).add_(rest).to(gradient.dtype)


def _dot(row: Tensor, gradient: Tensor) -> Tensor:
    sums = []
    for one, other in zip(row.split(LONG_RUN), gradient.split(LONG_RUN), strict=True):
        # the library keeps few running sums, and one is off by a part in 1e-5, unless both lie alike in its vectors
        alike = (one.data_ptr() - other.data_ptr()) % VECTOR == 0
        sums.append(torch.dot(one, other) if alike else torch.dot(one.clone(), other.clone()))
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


class Ids(Groups):
    """Any elements: an integer for each says which coefficient it uses.

    Args:
        count: coefficients of an expert.
        make: gives the ids, ``(numel,)``, each in [0, count), in the smallest dtype that holds them; called when they are
            needed, and what it gives is kept from the first contraction on.
    """

    def __init__(self, count: int, make: Callable[[], Tensor]) -> None:
        self.count, self.make = count, make
        self.ids: Tensor | None = None

    @staticmethod
    def dtype(count: int) -> torch.dtype:
        """The smallest of integers that holds the ids of so many coefficients."""
        return torch.uint8 if count <= 1 << 8 else torch.int16 if count <= 1 << 15 else torch.int32

    def kept(self, numel: int) -> int:
        """The ids."""
        return numel * self.dtype(self.count).itemsize

    def within(self, part: slice, numel: int, device: torch.device) -> Shared:
        """The ids there, as indices."""
        ids = (self.make() if self.ids is None else self.ids).to(device)
        return _Strewn(self, ids, part)


class _Strewn(Shared):
    def __init__(self, owner: Ids, ids: Tensor, part: slice) -> None:
        self.owner, self.ids = owner, ids
        self.indices = ids[part].long()

    def fill(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        torch.mul(coefficients[0].index_select(0, self.indices), rows[0], out=out)
        self.accumulate(out, rows[1:], coefficients[1:])

    def accumulate(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        for row, own in zip(rows, coefficients, strict=True):
            out.addcmul_(own.index_select(0, self.indices), row)

    def contract(self, rows: Tensor, gradient: Tensor) -> Tensor:
        self.owner.ids = self.ids
        # summed over runs and then over those, so that rounding does not grow with the tensor; a run's sums are few
        count = self.owner.count
        run = max(SEGMENT, 16 * count)
        runs = gradient.numel() // run
        whole = runs * run
        found = []
        for row in rows:
            products = row * gradient
            sums = torch.zeros(runs + 1, count, dtype=gradient.dtype, device=rows.device)
            sums[:-1].scatter_add_(1, self.indices[:whole].view(runs, run), products[:whole].view(runs, run))
            sums[-1].scatter_add_(0, self.indices[whole:], products[whole:])
            found.append(sums.sum(dim=0))
        return torch.stack(found)
