"""Sums of several rows by one call of a CPU's library, used only where each element's sum has the bits of adding row by row.

Merged tensors must not depend on where a tensor is cut or which storage holds its rows: a merge in training, in an
evaluation and in an export cut it differently and must agree to the bit. Adding row by row, each product fused with its
addition, is that order. Two libraries add several rows in one call and read each row once: the linear algebra library
(``addmv``) and the weighted lookup (``embedding_bag``). Whether they keep that order depends on the processor, so each is
asked once, with examples, before it is used.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from adamerge.deltas.tuning import BAG, FEW, FEWEST


def add_each(out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
    """Adds ``coefficients[t] * rows[t]`` onto ``out``, one row after the other: the order that all sums have."""
    for row, coefficient in zip(rows.unbind(), coefficients.unbind(), strict=True):
        out.addcmul_(row, coefficient)


def rows_at_once(rows: Tensor, coefficients: Tensor) -> int:
    """Returns how many rows one call of the linear algebra library adds; 0 where it is not used."""
    if rows.dtype != coefficients.dtype:
        return 0
    if rows.device.type != "cpu":
        return max(1, len(rows))
    return FEW if _adds_one_by_one() else 0


def bag_size(rows: Tensor, coefficients: Tensor, run: int) -> int:
    """Returns how many elements of all rows the weighted lookup adds up at a time; 0 where it is not used.

    Args:
        rows: ``(t, n)``.
        coefficients: of the sum.
        run: elements that lie side by side and share a coefficient, n or a divisor of it.
    """
    if len(rows) < FEW or rows.device.type != "cpu" or not rows.dtype == coefficients.dtype == torch.float32:
        return 0
    # what is looked up are pieces of one length, in a table of them that begins with the first row
    size = math.gcd(run, rows.stride(0), BAG) if run and rows.stride(1) == 1 else 0
    return size if size >= FEWEST and _bags_add_one_by_one() else 0


def summed_in_bags(rows: Tensor, coefficients: Tensor, size: int) -> Tensor:
    """Returns ``sum_t coefficients[t, g] rows[t]`` as a weighted lookup, of ``(t, n)`` and ``(t, runs of one length)``.

    Each piece of ``size`` elements is a bag of the rows' pieces.
    """
    (count, numel), stride, runs = rows.shape, rows.stride(0) // size, coefficients.shape[1]
    bags = numel // size
    table = rows.as_strided([(count - 1) * stride + bags, size], [size, 1])
    pieces, starts = _bags(bags, count, stride)
    weights = coefficients.t().unsqueeze(1).expand(runs, bags // runs, count).reshape(-1)
    return torch.embedding_bag(table, pieces, starts, False, 0, False, weights)[0].view(-1)


@functools.lru_cache(maxsize=16)  # a network has few shapes of many tensors, and up to 1024 bags each
@torch.inference_mode(False)
def _bags(bags: int, count: int, stride: int) -> tuple[Tensor, Tensor]:
    """Returns which rows of the table each bag adds up, one bag after the other, and where each bag begins."""
    pieces = torch.arange(bags, device="cpu").unsqueeze(1) + stride * torch.arange(count, device="cpu")
    return pieces.view(-1), torch.arange(0, bags * count, count, device="cpu")


@functools.cache
def _bags_add_one_by_one() -> bool:
    """Returns whether the CPU's weighted lookup adds as if row by row, to the bit."""
    for count in (FEW, 2 * FEW + 1):
        for size in (FEWEST, BAG):
            values, coefficients = _examples(count, 3 * size)
            summed, wanted = summed_in_bags(values, coefficients.unsqueeze(1), size), values[0] * coefficients[0]
            add_each(wanted, values[1:], coefficients[1:])
            if not torch.equal(summed, wanted):
                return False
    return True


@functools.cache
def _adds_one_by_one() -> bool:
    """Returns whether the CPU's algebra library adds a few rows as if one by one, to the bit, wherever they are cut.

    A library without fused multiply-add does not, nor does one that sums the rows first.
    """
    values, coefficients = _examples(FEW + 1, (1 << 16) + 3)
    for first in range(3):
        for last in [*range(first, first + 40), values.shape[1]]:
            rows, summed, wanted = values[1:, first:last], values[0, first:last].clone(), values[0, first:last].clone()
            summed.addmv_(rows.t(), coefficients[1:])
            add_each(wanted, rows, coefficients[1:])
            if not torch.equal(summed, wanted):
                return False
    return True


def _examples(count: int, numel: int) -> tuple[Tensor, Tensor]:
    """Returns rows and coefficients to ask a library with, the same each time."""
    generator = torch.Generator("cpu").manual_seed(0)
    values = torch.randn(count, numel, generator=generator, device="cpu")
    return values, torch.randn(count, generator=generator, device="cpu")
