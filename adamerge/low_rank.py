"""Low-rank deltas: kept as factors, summed by one product of all factors and contracted without ever being dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from adamerge.deltas import Deltas, Groups, Whole
from adamerge.factors import Factors, matrix_shape


class LowRankDeltas(Deltas):
    """``tau_k = left @ diag(weights[k]) @ right``: the factors of all experts side by side, of ranks that may differ.

    One coefficient for the whole tensor needs one product of factors, ``sum_k c_k tau_k = (left * (c @ weights)) @ right``,
    and ``<G, tau_k> = sum_j weights[k, j] <left[:, j]^T G, right[j]>``. Coefficients of parts of a tensor make it dense,
    one expert at a time.

    Args:
        read: gives left ``(rows, all ranks)`` and right ``(all ranks, columns)``.
        weights: ``(experts, all ranks)``, on the CPU: an expert's scale at its own factors, else 0.
        shape: of the tensor, whose first dimension is the rows.
        device: where combinations are computed.
    """

    def __init__(
        self, read: Callable[[], tuple[Tensor, Tensor]], weights: Tensor, shape: torch.Size, device: torch.device
    ) -> None:
        self.read, self.weights, self.shape, self.device = read, weights, shape, device

    @classmethod
    def of(cls, experts: Sequence[Factors], shape: torch.Size, device: torch.device) -> LowRankDeltas:
        """The deltas of several experts, read anew each time."""
        weights = torch.block_diag(*(torch.full((1, one.rank), one.scale) for one in experts))

        def read() -> tuple[Tensor, Tensor]:
            left = torch.cat([one.left().to(device, torch.float32) for one in experts], dim=1)
            return left, torch.cat([one.right().to(device, torch.float32) for one in experts])

        return cls(read, weights, shape, device)

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """One dense block per expert, from its own factors alone."""
        left, right = self.read()
        for row in self.weights:
            own = row.nonzero().flatten()
            weighted = left[:, own.to(left.device)].to(dtype) * row[own].to(left.device, dtype)
            yield (weighted @ right[own.to(right.device)].to(dtype)).reshape(1, -1)

    def kept(self, keep: Callable[[Deltas, int], Deltas], count: int) -> Deltas:
        """The same factors, on ``device`` in fp32 whatever dense deltas are kept in: they are small."""
        left, right = self.read()
        return LowRankDeltas(lambda: (left, right), self.weights, self.shape, self.device)

    def elements(self, count: int) -> tuple[int, int]:
        """Those of the factors."""
        return 0, self.weights.shape[1] * sum(matrix_shape(self.shape))

    def mapped(self, matrix: Tensor) -> Deltas:
        """The same factors, with other weights."""
        return LowRankDeltas(self.read, matrix.to(self.weights) @ self.weights, self.shape, self.device)

    def accumulate(self, out: Tensor, coefficients: Tensor, groups: Groups) -> None:
        """One product of factors, added to ``out``."""
        if not isinstance(groups, Whole):
            super().accumulate(out, coefficients, groups)
            return
        left, right = (factor.to(out.dtype) for factor in self.read())
        weights = coefficients[:, 0] @ self.weights.to(coefficients)
        out.view(matrix_shape(self.shape)).addmm_(left * weights, right)

    def contract(self, gradient: Tensor, groups: Groups) -> Tensor:
        """``<G, tau_k>`` by factors."""
        if not isinstance(groups, Whole):
            return super().contract(gradient, groups)
        left, right = (factor.to(gradient.dtype) for factor in self.read())
        products = ((left.t() @ gradient.reshape(matrix_shape(self.shape))) * right).sum(dim=1)
        return torch.mv(self.weights.to(products), products).unsqueeze(1)


class JoinedDeltas(Deltas):
    """Deltas of several kinds, one after the other: dense experts and low-rank ones in one pool.

    Args:
        parts: how many experts each has, and their deltas; all of one shape and device.
    """

    def __init__(self, parts: Sequence[tuple[int, Deltas]]) -> None:
        self.parts = tuple(parts)
        self.shape, self.device = parts[0][1].shape, parts[0][1].device

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """The blocks of each part."""
        for _, part in self.parts:
            yield from part.blocks(dtype)

    def kept(self, keep: Callable[[Deltas, int], Deltas], count: int) -> Deltas:
        """Each part kept in its own way."""
        return JoinedDeltas([(own, part.kept(keep, own)) for own, part in self.parts])

    def elements(self, count: int) -> tuple[int, int]:
        """Those of the parts."""
        dense, factors = zip(*(part.elements(own) for own, part in self.parts), strict=True)
        return sum(dense), sum(factors)

    def mapped(self, matrix: Tensor) -> Deltas:
        """Each part scaled in its own way, when no expert becomes part of another."""
        if not torch.equal(matrix, torch.diag(matrix.diagonal())):
            return super().mapped(matrix)
        scales = matrix.diagonal().split([count for count, _ in self.parts])
        scaled = zip(self.parts, scales, strict=True)
        return JoinedDeltas([(count, part.mapped(torch.diag(scale))) for (count, part), scale in scaled])

    def accumulate(self, out: Tensor, coefficients: Tensor, groups: Groups) -> None:
        """Part after part."""
        rows = coefficients.split([count for count, _ in self.parts])
        for (_, part), own in zip(self.parts, rows, strict=True):
            part.accumulate(out, own, groups)

    def contract(self, gradient: Tensor, groups: Groups) -> Tensor:
        """The parts' contractions, one below the other."""
        return torch.cat([part.contract(gradient, groups) for _, part in self.parts])
