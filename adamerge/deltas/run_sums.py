"""Run sums: sums where each of several runs of elements has a coefficient; runs of one length are summed all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adamerge.deltas.cpu_sums import bag_size, summed_in_bags
from adamerge.deltas.kernels import SharedSums, add_rows, dots, sum_rows
from adamerge.deltas.tuning import RUN


class Runs(NamedTuple):
    """Consecutive runs of one length: the elements of a part that they are, the first one's coefficient, and how many."""

    elements: slice
    first: int
    number: int

    @property
    def coefficients(self) -> slice:
        """Returns the coefficients of the runs."""
        return slice(self.first, self.first + self.number)


class RunSums(SharedSums):
    """Sums where each of several runs of elements has a coefficient.

    Args:
        runs: of the part, in order and without gaps.
    """

    def __init__(self, runs: Sequence[Runs]) -> None:
        self.runs = runs
        self.touched = slice(runs[0].first, runs[-1].coefficients.stop) if runs else slice(0, 0)

    def sum(self, rows: Tensor, coefficients: Tensor) -> Tensor:
        """Returns the sums of the runs, one after the other."""
        sums = [_sum(rows[:, own.elements], coefficients[:, own.coefficients]) for own in self.runs]
        return sums[0] if len(sums) == 1 else torch.cat(sums) if sums else coefficients.new_empty(0)

    def accumulate(self, out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
        """Adds each run's sum onto its elements of ``out``."""
        for own in self.runs:
            _add(out[own.elements], rows[:, own.elements], coefficients[:, own.coefficients])

    def contract(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """Returns each run's products with its part of the gradient."""
        sums = [_dots(rows[:, own.elements], gradient[own.elements], own.number) for own in self.runs]
        return sums[0] if len(sums) == 1 else torch.cat(sums, dim=1) if sums else gradient.new_empty(len(rows), 0)


def _sum(rows: Tensor, coefficients: Tensor) -> Tensor:
    """Returns ``sum_t coefficients[t, g] rows[t]`` over runs of one length, with the bits of ``sum_rows`` for each run."""
    runs = coefficients.shape[1]
    if runs == 1:
        return sum_rows(rows, coefficients[:, 0])
    if rows.device.type != "cpu" and rows.dtype == coefficients.dtype:
        return torch.bmm(coefficients.t().unsqueeze(1), rows.unflatten(1, (runs, -1)).transpose(0, 1)).view(-1)
    size = bag_size(rows, coefficients, rows.shape[1] // runs)
    if size:
        return summed_in_bags(rows, coefficients, size)
    out = torch.mul(rows[0].view(runs, -1), coefficients[0].unsqueeze(1)).view(-1)
    _add(out, rows[1:], coefficients[1:])
    return out


def _add(out: Tensor, rows: Tensor, coefficients: Tensor) -> None:
    """Adds ``sum_t coefficients[t, g] rows[t]`` over runs of one length onto ``out``, one row after the other."""
    runs = coefficients.shape[1]
    if runs == 1:
        add_rows(out, rows, coefficients[:, 0])
        return
    for row, own in zip(rows, coefficients, strict=True):
        out.view(runs, -1).addcmul_(row.view(runs, -1), own.unsqueeze(1))


def _dots(rows: Tensor, gradient: Tensor, runs: int) -> Tensor:
    """Returns the products of rows with a gradient over runs of one length: (t, n) and (n,) to (t, runs).

    No sum in fp32 goes over more than ``RUN`` elements; those of longer runs are added in float64.
    """
    if runs == 1:
        return dots(rows, gradient).unsqueeze(1)
    parts, slopes = rows.to(gradient.dtype).unflatten(1, (runs, -1)), gradient.view(runs, -1)
    length = slopes.shape[1]
    sums = [
        torch.bmm(slopes[:, at : at + RUN].unsqueeze(1), parts[:, :, at : at + RUN].permute(1, 2, 0))[:, 0]
        for at in range(0, length, RUN)
    ]
    if len(sums) == 1:
        return sums[0].t()
    # a device sums pairs of pairs, and may know no float64
    dtype = torch.float64 if rows.device.type == "cpu" else None
    return torch.stack(sums).sum(dim=0, dtype=dtype).to(gradient.dtype).t()
