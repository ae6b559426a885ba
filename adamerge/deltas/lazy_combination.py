"""Combinations: sums of deltas as autograd knows them, whose values are computed when they are asked for, part by part."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from adamerge.deltas.base import Deltas
from adamerge.deltas.groups import Groups
from adamerge.precision import exact


class Combination:
    """A sum of deltas whose values are computed when they are asked for, part by part, and whose coefficients lead back.

    Args:
        deltas: that are combined.
        coefficients: ``(experts, groups.count)``, differentiable.
        groups: which elements use which.
    """

    def __init__(self, deltas: Deltas, coefficients: Tensor, groups: Groups) -> None:
        self.deltas, self.coefficients, self.groups = deltas, coefficients, groups

    def values(self, size: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive parts, each with its flat values; without autograd.

        Args:
            size: elements of a part; what suits the deltas when None.
        """
        coefficients = self.coefficients.detach()
        for piece, deltas in self.deltas.in_pieces(size=size):
            with exact(deltas.device):
                found = deltas.summed(coefficients, self.groups, piece)
            yield piece, found

    def contract(self, gradient: Tensor) -> Tensor:
        """The gradient of all values to that of the coefficients."""
        return self.deltas.contract(gradient, self.groups)


class Outline(Deltas):
    """Deltas that are contracted and never summed: what they combine to has a shape and a way back, but no values.

    Args:
        of: the deltas.
    """

    def __init__(self, of: Deltas) -> None:
        self.of, self.shape, self.device = of, of.shape, of.device
        self._combined: tuple[Tensor, Combination] | None = None

    def combine(self, coefficients: Tensor, groups: Groups) -> Tensor:
        """No values, and a note of what they would be."""
        found = super().combine(coefficients, groups)
        self._combined = found, Combination(self.of, coefficients, groups)
        return found

    def combination(self, update: Tensor) -> Combination | None:
        """The combination that an update is, and nothing else; None where something was done with one."""
        if self._combined is None or self._combined[0] is not update:
            return None
        return self._combined[1]

    def blocks(self, dtype: torch.dtype, part: slice | None = None) -> Iterator[Tensor]:
        """As they are."""
        return self.of.blocks(dtype, part)

    def summed(self, coefficients: Tensor, groups: Groups, part: slice | None = None) -> Tensor:
        """Zeros that take no room."""
        return coefficients.new_zeros(()).expand(self.shape.numel())

    def contract(self, gradient: Tensor, groups: Groups, part: slice | None = None) -> Tensor:
        """As they are contracted."""
        return self.of.contract(gradient, groups, part)
