"""Groups: which elements of one tensor share a coefficient, ``g`` of theta0[e] + sum_k w[k, g(e)] tau_k[e]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from adamerge.deltas.kernels import add_rows, dots, sum_rows

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

    @property
    def per_element(self) -> int:
        """Bytes that a sum takes for a moment, for each element of what it goes through at once."""
        return 0


class Shared(ABC):
    """Which elements of a part of a tensor use which coefficients; ``n`` elements, ``count`` coefficients an expert."""

    @abstractmethod
    def sum(self, rows: Tensor, coefficients: Tensor) -> Tensor:
        """``sum_t coefficients[t, g] * rows[t]``, of shape (n,); rows (t, n), coefficients (t, count).

        Rows may be of a narrower dtype, here and below; all is computed in that of the coefficients or the gradient.
        """

    @abstractmethod
    def accumulate(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        """The same, onto what is in ``out`` (n,)."""

    @abstractmethod
    def contract(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """Sum of ``gradient * rows[t]`` over the elements of each group; (t, n) and (n,) to (t, count)."""


class Whole(Groups):
    """All elements of the tensor share one coefficient."""

    count = 1

    def within(self, part: slice, numel: int, device: torch.device) -> Shared:
        """The one coefficient."""
        return _One()


class _One(Shared):
    """One coefficient for all elements."""

    def sum(self, rows: Tensor, coefficients: Tensor) -> Tensor:
        return sum_rows(rows, coefficients[:, 0])

    def accumulate(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        add_rows(out, rows, coefficients[:, 0])

    def contract(self, rows: Tensor, gradient: Tensor) -> Tensor:
        return dots(rows, gradient).unsqueeze(1)


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

    def sum(self, rows: Tensor, coefficients: Tensor) -> Tensor:
        sums = [sum_rows(rows[:, run], coefficients[:, group]) for group, run in enumerate(self.slices, self.first)]
        return sums[0] if len(sums) == 1 else torch.cat(sums) if sums else coefficients.new_empty(0)

    def accumulate(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        for group, run in enumerate(self.slices, self.first):
            add_rows(out[run], rows[:, run], coefficients[:, group])

    def contract(self, rows: Tensor, gradient: Tensor) -> Tensor:
        sums = [dots(rows[:, run], gradient[run]) for run in self.slices]
        if len(sums) == self.count:
            return torch.stack(sums, dim=1)
        found = gradient.new_zeros(len(rows), self.count)
        for group, own in enumerate(sums, self.first):
            found[:, group] = own
        return found


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

    @property
    def per_element(self) -> int:
        """An id, as an index too, and a coefficient in fp32."""
        return self.dtype(self.count).itemsize + torch.int64.itemsize + torch.float32.itemsize

    def within(self, part: slice, numel: int, device: torch.device) -> Shared:
        """The ids there, as indices."""
        ids = (self.make() if self.ids is None else self.ids).to(device)
        return _Strewn(self, ids, part)


class _Strewn(Shared):
    def __init__(self, owner: Ids, ids: Tensor, part: slice) -> None:
        self.owner, self.ids = owner, ids
        self.indices = ids[part].long()

    def sum(self, rows: Tensor, coefficients: Tensor) -> Tensor:
        found = coefficients[0].index_select(0, self.indices).mul_(rows[0])
        self.accumulate(found, rows[1:], coefficients[1:])
        return found

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
