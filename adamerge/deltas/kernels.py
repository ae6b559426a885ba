"""Kernels: coefficients times experts' rows added up, and rows times a gradient summed, over the elements of each group.

Every merge ends here in ``SharedSums.sum``, every gradient of coefficients in ``SharedSums.contract``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from adamerge.deltas.cpu_sums import add_each, bag_size, rows_at_once, summed_in_bags
from adamerge.deltas.row_buffers import room
from adamerge.deltas.tuning import LONG_RUN, RUN, SEGMENT, VECTOR


class SharedSums(ABC):
    """Sums over a part of a tensor whose elements share coefficients; ``n`` elements, ``count`` coefficients an expert.

    Attributes:
        touched: which of the coefficients the part's elements use; what a contraction gives is of those alone.
    """

    touched: slice

    @abstractmethod
    def sum(self, rows: Tensor, coefficients: Tensor) -> Tensor:
        """Returns ``sum_t coefficients[t, g] * rows[t]``, of shape (n,), for rows (t, n) and coefficients (t, count).

        Rows may be of a narrower dtype, here and below; all is computed in that of the coefficients or the gradient.
        """

    @abstractmethod
    def accumulate(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        """Adds ``sum_t coefficients[t, g] * rows[t]`` onto what is in ``out`` (n,)."""

    @abstractmethod
    def contract(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """Returns the sums of ``gradient * rows[t]`` over the elements of each group; (t, n) and (n,) to (t, touched)."""


class OneSum(SharedSums):
    """Sums where all elements share one coefficient."""

    touched = slice(0, 1)

    def sum(self, rows: Tensor, coefficients: Tensor) -> Tensor:
        """Returns the weighted sum of rows, ``coefficients @ rows``."""
        return sum_rows(rows, coefficients[:, 0])

    def accumulate(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        """Adds the weighted sum of rows, ``coefficients @ rows``, onto ``out``."""
        add_rows(out, rows, coefficients[:, 0])

    def contract(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """Returns the dot products of rows with a gradient, ``rows @ gradient``."""
        return dots(rows, gradient).unsqueeze(1)


class IndexedSums(SharedSums):
    """Sums where an integer for each element says which coefficient it uses.

    Args:
        touched: the coefficients that the part's elements use.
        indices: of the part's elements, int64, counted from the first of those coefficients on.
        contracting: called before a contraction, so that the caller can keep the indices for the next one.
    """

    def __init__(self, touched: slice, indices: Tensor, contracting: Callable[[], object] = lambda: None) -> None:
        self.touched, self.indices, self.contracting = touched, indices, contracting

    def sum(self, rows: Tensor, coefficients: Tensor) -> Tensor:
        """Returns the rows times the coefficients that the indices look up, added up."""
        summed = coefficients[0, self.touched].index_select(0, self.indices).mul_(rows[0])
        self.accumulate(summed, rows[1:], coefficients[1:])
        return summed

    def accumulate(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        """Adds each row times the coefficients that the indices look up onto ``out``."""
        for row, own in zip(rows, coefficients, strict=True):
            out.addcmul_(own[self.touched].index_select(0, self.indices), row)

    def contract(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """Returns the products scattered to the coefficients.

        They are summed over runs and then over those, so that rounding does not grow with the tensor; a run's sums are few.
        """
        self.contracting()
        count = self.touched.stop - self.touched.start
        run = max(SEGMENT, 16 * count)
        runs = gradient.numel() // run
        whole = runs * run
        contracted = []
        for row in rows:
            products = row * gradient
            sums = torch.zeros(runs + 1, count, dtype=gradient.dtype, device=rows.device)
            sums[:-1].scatter_add_(1, self.indices[:whole].view(runs, run), products[:whole].view(runs, run))
            sums[-1].scatter_add_(0, self.indices[whole:], products[whole:])
            contracted.append(sums.sum(dim=0))
        return torch.stack(contracted)


def sum_rows(rows: Tensor, coefficients: Tensor) -> Tensor:
    """Returns ``coefficients @ rows``; rows of another dtype are widened inside the sum, and never in memory all at once.

    On a CPU each element's sum has the same bits wherever a tensor is cut and whatever holds its rows, as if one row was
    added after the other; a zero may have either sign.

    Args:
        rows: ``(t, n)``, at least one.
        coefficients: ``(t,)``, of the dtype of the sum.
    """
    size = bag_size(rows, coefficients, rows.shape[1])
    if size:
        return summed_in_bags(rows, coefficients.unsqueeze(1), size)
    few = rows_at_once(rows, coefficients)
    out = room(rows.shape[1:], coefficients.dtype, rows.device)
    if few:
        # the library has another way of adding with coefficients that do not lie side by side
        torch.mv(rows[:few].t(), coefficients[:few].contiguous(), out=out)
    else:
        few = 1
        # a number without a dimension would be rounded to the row's dtype
        torch.mul(rows[0], coefficients[:1], out=out)
    if few < len(rows):
        add_rows(out, rows[few:], coefficients[few:])
    return out


def add_rows(out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
    """Adds ``coefficients @ rows`` onto what is in ``out``."""
    few = rows_at_once(rows, coefficients)
    if few:
        coefficients = coefficients.contiguous()
        for first in range(0, len(rows), few):
            out.addmv_(rows[first : first + few].t(), coefficients[first : first + few])
    else:
        add_each(out, rows, coefficients)


def dots(rows: Tensor, gradient: Tensor) -> Tensor:
    """Returns ``rows @ gradient``, summed run by run: one running sum over a whole matrix would be off by up to 1e-4."""
    rows, on_host = rows.to(gradient.dtype), rows.device.type == "cpu"
    if len(rows) == 1 and on_host:
        return _dot(rows[0], gradient).view(1)
    whole = gradient.numel() // RUN * RUN
    if whole == 0:
        return torch.mv(rows, gradient)
    runs = torch.bmm(gradient[:whole].view(-1, 1, RUN), rows[:, :whole].unflatten(1, (-1, RUN)).permute(1, 2, 0))
    # a device sums pairs of pairs, and may know no float64
    products = runs[:, 0].sum(dim=0, dtype=torch.float64 if on_host else None)
    if whole < gradient.numel():
        products.add_(torch.mv(rows[:, whole:], gradient[whole:]))
    return products.to(gradient.dtype)


def _dot(row: Tensor, gradient: Tensor) -> Tensor:
    sums = []
    for one, other in zip(row.split(LONG_RUN), gradient.split(LONG_RUN), strict=True):
        # the library keeps few running sums, and one is off by a part in 1e5, unless both lie alike in its vectors
        alike = (one.data_ptr() - other.data_ptr()) % VECTOR == 0
        sums.append(torch.dot(one, other) if alike else torch.dot(one.clone(), other.clone()))
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()
