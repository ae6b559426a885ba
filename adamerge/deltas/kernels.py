"""Sums: rows of several experts added by one coefficient each, and their products with a gradient."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from adamerge.deltas.row_buffers import FEW, room

RUN = 1 << 14
"""Elements whose products with several rows the linear algebra library sums at a time."""

LONG_RUN = 1 << 16
"""The same for one row, of which it keeps more sums."""

VECTOR = 16
"""Bytes of the vectors in which it sums those."""

BAG = 1 << 12
"""Elements, at most, that are added up at a time where all rows are: their sums stay in a processor's registers."""

FEWEST = 1 << 8
"""Elements, at least, for which that takes less time than adding row by row."""


def sum_rows(rows: Tensor, coefficients: Tensor) -> Tensor:
    """``coefficients @ rows``; rows of another dtype are widened inside the sum, and never in memory all at once.

    On a CPU each element's sum has the same bits wherever a tensor is cut and whatever holds its rows, as if one row was
    added after the other; a zero may have either sign.

    Args:
        rows: ``(t, n)``, at least one.
        coefficients: ``(t,)``, of the dtype of the sum.
    """
    size = _bag_size(rows, coefficients)
    if size:
        return _summed_in_bags(rows, coefficients, size)
    few = _at_once(rows, coefficients)
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
    """The same, onto what is there."""
    few = _at_once(rows, coefficients)
    if few:
        coefficients = coefficients.contiguous()
        for first in range(0, len(rows), few):
            out.addmv_(rows[first : first + few].t(), coefficients[first : first + few])
    else:
        _add_each(out, rows, coefficients)


def _add_each(out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
    for row, coefficient in zip(rows.unbind(), coefficients.unbind(), strict=True):
        out.addcmul_(row, coefficient)


def _at_once(rows: Tensor, coefficients: Tensor) -> int:
    """Rows that one call of the linear algebra library adds; 0 where it is not used."""
    if rows.dtype != coefficients.dtype:
        return 0
    if rows.device.type != "cpu":
        return max(1, len(rows))
    return FEW if _adds_one_by_one() else 0


def _bag_size(rows: Tensor, coefficients: Tensor) -> int:
    """Elements that are added up at a time where all rows are; 0 where one goes row by row."""
    if len(rows) < FEW or rows.device.type != "cpu" or not rows.dtype == coefficients.dtype == torch.float32:
        return 0
    # what is looked up are pieces of one length, in a table of them that begins with the first row
    size = math.gcd(rows.shape[1], rows.stride(0), BAG) if rows.shape[1] and rows.stride(1) == 1 else 0
    return size if size >= FEWEST and _bags_add_one_by_one() else 0


def _summed_in_bags(rows: Tensor, coefficients: Tensor, size: int) -> Tensor:
    """The sum as a weighted lookup: each piece of it is a bag of the rows' pieces, and each row is read once."""
    (count, numel), stride = rows.shape, rows.stride(0) // size
    bags = numel // size
    table = rows.as_strided([(count - 1) * stride + bags, size], [size, 1])
    pieces, starts = _bags(bags, count, stride)
    weights = coefficients.expand(bags, count).reshape(-1)
    return torch.embedding_bag(table, pieces, starts, False, 0, False, weights)[0].view(-1)


@functools.lru_cache(maxsize=16)  # a network has few shapes of many tensors, and up to 1024 bags each
@torch.inference_mode(False)
def _bags(bags: int, count: int, stride: int) -> tuple[Tensor, Tensor]:
    """The places in the table that each bag adds up, one bag after the other, and where each begins."""
    pieces = torch.arange(bags, device="cpu").unsqueeze(1) + stride * torch.arange(count, device="cpu")
    return pieces.view(-1), torch.arange(0, bags * count, count, device="cpu")


@functools.cache
def _bags_add_one_by_one() -> bool:
    """Whether the CPU's weighted lookup adds as if row by row, to the bit."""
    for count in (FEW, 2 * FEW + 1):
        for size in (FEWEST, BAG):
            values, coefficients = _examples(count, 3 * size)
            found, wanted = _summed_in_bags(values, coefficients, size), values[0] * coefficients[0]
            _add_each(wanted, values[1:], coefficients[1:])
            if not torch.equal(found, wanted):
                return False
    return True


@functools.cache
def _adds_one_by_one() -> bool:
    """Whether the CPU's linear algebra library adds a few rows as if one by one, to the bit, wherever they are cut.

    One without fused multiply-add does not, nor does one that sums the rows first.
    """
    values, coefficients = _examples(FEW + 1, (1 << 16) + 3)
    for first in range(3):
        for last in [*range(first, first + 40), values.shape[1]]:
            rows, found, wanted = values[1:, first:last], values[0, first:last].clone(), values[0, first:last].clone()
            found.addmv_(rows.t(), coefficients[1:])
            _add_each(wanted, rows, coefficients[1:])
            if not torch.equal(found, wanted):
                return False
    return True


def _examples(count: int, numel: int) -> tuple[Tensor, Tensor]:
    """Rows and coefficients to ask a library with, the same each time."""
    generator = torch.Generator("cpu").manual_seed(0)
    values = torch.randn(count, numel, generator=generator, device="cpu")
    return values, torch.randn(count, generator=generator, device="cpu")


def dots(rows: Tensor, gradient: Tensor) -> Tensor:
    """``rows @ gradient``, run by run: one running sum over a whole matrix would be off by up to a part in 1e4."""
    rows, on_host = rows.to(gradient.dtype), rows.device.type == "cpu"
    if len(rows) == 1 and on_host:
        return _dot(rows[0], gradient).view(1)
    whole = gradient.numel() // RUN * RUN
    if whole == 0:
        return torch.mv(rows, gradient)
    runs = torch.bmm(gradient[:whole].view(-1, 1, RUN), rows[:, :whole].unflatten(1, (-1, RUN)).permute(1, 2, 0))
    # a device sums pairs of pairs, and may know no float64
    found = runs[:, 0].sum(dim=0, dtype=torch.float64 if on_host else None)
    if whole < gradient.numel():
        found.add_(torch.mv(rows[:, whole:], gradient[whole:]))
    return found.to(gradient.dtype)


def _dot(row: Tensor, gradient: Tensor) -> Tensor:
    sums = []
    for one, other in zip(row.split(LONG_RUN), gradient.split(LONG_RUN), strict=True):
        # the library keeps few running sums, and one is off by a part in 1e5, unless both lie alike in its vectors
        alike = (one.data_ptr() - other.data_ptr()) % VECTOR == 0
        sums.append(torch.dot(one, other) if alike else torch.dot(one.clone(), other.clone()))
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()
