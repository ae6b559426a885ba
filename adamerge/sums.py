"""Sums: rows of several experts added by one coefficient each, and their products with a gradient."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

FEW = 4
"""Rows that one call of the linear algebra library adds up."""

RUN = 1 << 14
"""Elements whose products with several rows the linear algebra library sums at a time."""

LONG_RUN = 1 << 16
"""The same for one row, of which it keeps more sums."""

VECTOR = 16
"""Bytes of the vectors in which it sums those."""


def sum_rows(out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
    """``out = coefficients @ rows``; rows of another dtype are widened inside the sum, and never in memory all at once."""
    few = _at_once(out, rows)
    if few:
        # the library has another way of adding with coefficients that do not lie side by side
        torch.mv(rows[:few].t(), coefficients[:few].contiguous(), out=out)
    else:
        few = 1
        # a number without a dimension would be rounded to the row's dtype
        torch.mul(rows[0], coefficients[:1], out=out)
    add_rows(out, rows[few:], coefficients[few:])


def add_rows(out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
    """The same, onto what is there."""
    few = _at_once(out, rows)
    if few:
        coefficients = coefficients.contiguous()
        for first in range(0, len(rows), few):
            out.addmv_(rows[first : first + few].t(), coefficients[first : first + few])
    else:
        _add_each(out, rows, coefficients)


def _add_each(out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
    for row, coefficient in zip(rows.unbind(), coefficients.unbind(), strict=True):
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
    generator = torch.Generator("cpu").manual_seed(0)
    values = torch.randn(FEW + 1, (1 << 16) + 3, generator=generator, device="cpu")
    coefficients = torch.randn(FEW, generator=generator, device="cpu")
    for first in range(3):
        for last in [*range(first, first + 40), values.shape[1]]:
            rows, found, wanted = values[1:, first:last], values[0, first:last].clone(), values[0, first:last].clone()
            found.addmv_(rows.t(), coefficients)
            _add_each(wanted, rows, coefficients)
            if not torch.equal(found, wanted):
                return False
    return True


def dots(rows: Tensor, gradient: Tensor) -> Tensor:
    """``rows @ gradient``, run by run: one running sum over a whole matrix would be off by up to a part in 1e4."""
    rows, on_host = rows.to(gradient.dtype), rows.device.type == "cpu"
    if len(rows) == 1 and on_host:
        return _dot(rows[0], gradient).view(1)
    whole = gradient.numel() // RUN * RUN
    rest = torch.mv(rows[:, whole:], gradient[whole:])
    if whole == 0:
        return rest
    runs = torch.bmm(gradient[:whole].view(-1, 1, RUN), rows[:, :whole].unflatten(1, (-1, RUN)).permute(1, 2, 0))
    # a device sums pairs of pairs, and may know no float64
    return runs[:, 0].sum(dim=0, dtype=torch.float64 if on_host else None).add_(rest).to(gradient.dtype)


def _dot(row: Tensor, gradient: Tensor) -> Tensor:
    sums = []
    for one, other in zip(row.split(LONG_RUN), gradient.split(LONG_RUN), strict=True):
        # the library keeps few running sums, and one is off by a part in 1e5, unless both lie alike in its vectors
        alike = (one.data_ptr() - other.data_ptr()) % VECTOR == 0
        sums.append(torch.dot(one, other) if alike else torch.dot(one.clone(), other.clone()))
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()
