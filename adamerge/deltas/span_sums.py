"""Span sums: what the pieces of a tensor contribute to the coefficients that each of them touches, added up."""

from __future__ import annotations

import torch
from torch import Tensor


class SpanSums:
    """Contractions of a tensor, expert by expert and piece by piece, each of a span of the coefficients.

    In float64 where several pieces may touch the same coefficient; where none do, nothing is added, and what a piece gives
    is written where it belongs. One piece that touches all is the result itself.

    Args:
        count: coefficients of an expert.
        one: whether there is one piece alone.
        apart: whether no two pieces touch the same coefficient.
    """

    def __init__(self, count: int, one: bool, apart: bool) -> None:
        self.count, self.one, self.apart = count, one, apart
        self._sums: dict[int, Tensor] = {}  # of a few experts, by the number of the first

    def add(self, first: int, span: slice, sums: Tensor) -> None:
        """Adds the sums ``(t, coefficients of the span)`` of experts from number ``first`` on."""
        if self.one and span == slice(0, self.count):
            self._sums[first] = sums
            return
        if first not in self._sums:
            dtype = sums.dtype if self.one or self.apart else torch.float64
            self._sums[first] = sums.new_zeros(len(sums), self.count, dtype=dtype)
        self._sums[first][:, span] += sums

    def result(self, dtype: torch.dtype) -> Tensor:
        """Returns the sums of all experts, ``(experts, count)``."""
        sums = list(self._sums.values())
        return (sums[0] if len(sums) == 1 else torch.cat(sums)).to(dtype)
