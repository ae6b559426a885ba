"""Low-rank deltas: stored as factors, summed by one product of all factors and contracted without ever being dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from adamerge.checkpoints.lora_factors import Factors, matrix_shape
from adamerge.deltas.base import Deltas
from adamerge.deltas.factor_products import product, slopes
from adamerge.deltas.groups import Components, Groups, RowsAndColumns, Whole
from adamerge.precision import exact


class LowRankDeltas(Deltas):
    """``tau_k = left @ diag(weights[k]) @ right``: the factors of all experts side by side, of ranks that may differ.

    One coefficient for the whole tensor needs one product of factors, ``sum_k c_k tau_k = (left * (c @ weights)) @ right``,
    and ``<G, tau_k> = sum_j weights[k, j] <left[:, j]^T G, right[j]>``; coefficients of rows and columns, a product of twice
    the ranks; coefficients of components, ``sum_k left @ diag(weights[k] * c_k) @ right``, no more than that of the whole.
    Coefficients of other parts of a tensor make it dense, one expert at a time.

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
        """Returns the deltas of several experts' factors, which are read anew each time."""
        weights = torch.block_diag(*(torch.full((1, one.rank), one.scale, device="cpu") for one in experts))

        def read() -> tuple[Tensor, Tensor]:
            left = torch.cat([one.left().to(device, torch.float32, non_blocking=True) for one in experts], dim=1)
            return left, torch.cat([one.right().to(device, torch.float32, non_blocking=True) for one in experts])

        return cls(read, weights, shape, device)

    def row_batches(self, dtype: torch.dtype, part: slice | None = None) -> Iterator[Tensor]:
        """Yields one expert's dense row at a time, from its own factors alone."""
        left, right = self.read()
        for row in self.weights:
            own = row.nonzero().flatten()
            there = own.to(left.device, non_blocking=True)
            weighted = left[:, there].to(dtype) * row[own].to(left.device, dtype, non_blocking=True)
            dense = (weighted @ right[there].to(dtype)).reshape(1, -1)
            yield dense if part is None else dense[:, part]

    def in_memory(self, store: Callable[[Deltas, int], Deltas], count: int) -> Deltas:
        """Returns the same factors, on ``device`` in fp32 however dense deltas are stored: factors are small."""
        left, right = self.read()
        return LowRankDeltas(lambda: (left, right), self.weights, self.shape, self.device)

    def elements(self, count: int) -> tuple[int, int]:
        """Returns how many numbers the factors have; none are dense."""
        return 0, self.weights.shape[1] * sum(matrix_shape(self.shape))

    def terms(self, count: int) -> list[int | None]:
        """Returns how many columns of the factors each expert has."""
        return [int(own) for own in (self.weights != 0).sum(dim=1)]

    def mapped(self, matrix: Tensor) -> Deltas:
        """Returns the same factors with the weights of the new experts."""
        with exact(self.weights.device):
            return LowRankDeltas(self.read, matrix.to(self.weights) @ self.weights, self.shape, self.device)

    def summed(self, coefficients: Tensor, groups: Groups, part: slice | None = None) -> Tensor:
        """Returns the sum by one product of factors, for coefficients of the whole, components, rows and columns; else dense.

        ``sum_k diag(r_k) tau_k + tau_k diag(c_k) = [left * (r^T @ weights), left] @ [right; right * (weights^T @ c)]``.
        """
        rows = self._rows(part)
        if not isinstance(groups, Whole | Components | RowsAndColumns) or rows is None:
            return super().summed(coefficients, groups, part)
        left, right = (factor.to(coefficients.dtype) for factor in self.read())
        left, weights = left[rows], self.weights.to(coefficients, non_blocking=True)
        if isinstance(groups, Whole):
            return torch.mm(left * (coefficients[:, 0] @ weights), right).view(-1)
        if isinstance(groups, Components):
            own = coefficients.gather(1, self._number_of.to(coefficients.device, non_blocking=True))
            return product(left, right, (own * weights).sum(dim=0)).view(-1)
        of_rows, of_columns = coefficients.split([groups.rows, groups.columns], dim=1)
        both = torch.cat([left * (of_rows[:, rows].t() @ weights), left], dim=1)
        return torch.mm(both, torch.cat([right, right * (weights.t() @ of_columns)])).view(-1)

    def contract(self, gradient: Tensor, groups: Groups, part: slice | None = None) -> Tensor:
        """Returns products of the gradient with factors, for coefficients of the whole, components, rows and columns; else
        those with dense rows.

        Of components ``dL/dc_k[j] = weights[k, j] left[:, j]^T G right[j]``; ``dL/dr_k[i] = sum_j weights[k, j] left[i, j]
        (G right^T)[i, j]``, and alike for columns.
        """
        rows = self._rows(part)
        if not isinstance(groups, Whole | Components | RowsAndColumns) or rows is None:
            return super().contract(gradient, groups, part)
        left, right = (factor.to(gradient.dtype) for factor in self.read())
        left, matrix = left[rows], gradient.reshape(rows.stop - rows.start, right.shape[1])
        weights = self.weights.to(gradient, non_blocking=True)
        if isinstance(groups, Whole):
            return torch.mv(weights, slopes(left, matrix, right)).unsqueeze(1)
        contracted = gradient.new_zeros(len(weights), groups.count)
        if isinstance(groups, Components):
            own = self._number_of.to(gradient.device, non_blocking=True)
            # what an expert has no part in adds a zero to the component before it
            return contracted.scatter_add_(1, own, weights * slopes(left, matrix, right))
        contracted[:, rows] = weights @ (left * (matrix @ right.t())).t()
        contracted[:, groups.rows :] = weights @ ((left.t() @ matrix) * right)
        return contracted

    @property
    def _number_of(self) -> Tensor:
        """Returns which of its own components each expert calls a column of the factors, ``(experts, all ranks)``."""
        return ((self.weights != 0).cumsum(dim=1) - 1).clamp_(min=0)

    def _rows(self, part: slice | None) -> slice | None:
        """Returns which rows of the matrix a part is; None where it cuts through one."""
        rows, columns = matrix_shape(self.shape)
        if part is None or columns == 0:
            return slice(0, rows)
        whole = part.start % columns == 0 and part.stop % columns == 0
        return slice(part.start // columns, part.stop // columns) if whole else None


class JoinedDeltas(Deltas):
    """Deltas of several kinds, one after the other: dense experts and low-rank ones in one pool.

    Args:
        kinds: how many experts each has, and their deltas; all of one shape and device.
    """

    def __init__(self, kinds: Sequence[tuple[int, Deltas]]) -> None:
        self.kinds = tuple(kinds)
        self.shape, self.device = kinds[0][1].shape, kinds[0][1].device

    def row_batches(self, dtype: torch.dtype, part: slice | None = None) -> Iterator[Tensor]:
        """Yields the batches of each kind, one kind after the other."""
        for _, kind in self.kinds:
            yield from kind.row_batches(dtype, part)

    def in_memory(self, store: Callable[[Deltas, int], Deltas], count: int) -> Deltas:
        """Returns the kinds, each stored in its own way."""
        return JoinedDeltas([(own, kind.in_memory(store, own)) for own, kind in self.kinds])

    def elements(self, count: int) -> tuple[int, int]:
        """Returns how many numbers all kinds have together: dense ones, and those of factors."""
        dense, factors = zip(*(kind.elements(own) for own, kind in self.kinds), strict=True)
        return sum(dense), sum(factors)

    def terms(self, count: int) -> list[int | None]:
        """Returns the kinds' terms, one kind after the other."""
        return [terms for own, kind in self.kinds for terms in kind.terms(own)]

    def mapped(self, matrix: Tensor) -> Deltas:
        """Returns the kinds scaled, each in its own way, when no expert becomes part of another."""
        if not torch.equal(matrix, torch.diag(matrix.diagonal())):
            return super().mapped(matrix)
        scales = matrix.diagonal().split([count for count, _ in self.kinds])
        scaled = zip(self.kinds, scales, strict=True)
        return JoinedDeltas([(count, kind.mapped(torch.diag(scale))) for (count, kind), scale in scaled])

    def summed(self, coefficients: Tensor, groups: Groups, part: slice | None = None) -> Tensor:
        """Returns the sum of the kinds' sums."""
        rows = coefficients.split([count for count, _ in self.kinds])
        sums = [kind.summed(own, groups, part) for (_, kind), own in zip(self.kinds, rows, strict=True)]
        for other in sums[1:]:
            sums[0].add_(other)
        return sums[0]

    def contract(self, gradient: Tensor, groups: Groups, part: slice | None = None) -> Tensor:
        """Returns the kinds' contractions, one below the other."""
        return torch.cat([kind.contract(gradient, groups, part) for _, kind in self.kinds])
