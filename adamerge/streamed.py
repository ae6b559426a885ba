"""Deltas read from disk: raw tensors, subtracted anew at each read, a small piece of a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from adamerge.deltas import Deltas, Groups, PartOfDeltas

PIECE = 1 << 15
"""Elements of a piece: what is read from disk is combined piece by piece, in buffers that stay in a processor's cache.

So few that torch computes them in one thread: waiting for another at each piece would take longer, on a busy machine much.
"""


class StreamedDeltas(Deltas):
    """Deltas of raw tensors, subtracted anew at each read, one expert in memory at a time.

    Args:
        base: gives the base's tensor of this name.
        experts: each gives one expert's tensor of this name.
        shape: of the tensor.
        device: where combinations are computed.
    """

    def __init__(
        self,
        base: Callable[[], Tensor],
        experts: Sequence[Callable[[], Tensor]],
        shape: torch.Size,
        device: torch.device,
    ) -> None:
        self.base, self.experts, self.shape, self.device = base, experts, shape, device

    def within(self, part: slice) -> Deltas:
        """Nothing else is read."""

        def cut(read: Callable[[], Tensor]) -> Callable[[], Tensor]:
            return lambda: read().reshape(-1)[part]

        shape = torch.Size([part.stop - part.start])
        return PartOfDeltas(self, StreamedDeltas(cut(self.base), [*map(cut, self.experts)], shape, self.device), part)

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """One block per expert."""
        base = self.base().to(self.device, dtype)
        for expert in self.experts:
            # the wider dtype of `base` decides, so a half-precision expert is subtracted in `dtype` in one operation
            yield torch.sub(expert().to(self.device, non_blocking=True), base).to(dtype).reshape(1, -1)

    def accumulate(self, out: Tensor, coefficients: Tensor, groups: Groups) -> None:
        """Piece by piece."""
        groups = groups.placed(out.device)
        for piece, rows in self._pieces(coefficients.dtype):
            self._add(out[piece], piece, rows, coefficients, groups)

    def pieces(self, coefficients: Tensor, groups: Groups) -> Iterator[Tensor]:
        """No more in memory than a piece."""
        coefficients, groups = coefficients.detach(), groups.placed(self.device)
        for piece, rows in self._pieces(coefficients.dtype):
            out = torch.zeros(piece.stop - piece.start, dtype=coefficients.dtype, device=self.device)
            with torch.autocast(self.device.type, enabled=False):
                self._add(out, piece, rows, coefficients, groups)
            yield out

    def contract(self, gradient: Tensor, groups: Groups) -> Tensor:
        """Piece by piece; the pieces' sums are summed in float64, so that rounding does not grow with their number."""
        flat, groups = gradient.reshape(-1), groups.placed(gradient.device)
        found = torch.zeros(len(self.experts), groups.count, dtype=torch.float64, device=gradient.device)
        for piece, rows in self._pieces(gradient.dtype):
            own = groups.within(piece.start, piece.stop, self.shape.numel())
            for sums, row in zip(found, rows, strict=True):
                sums += own.contract(row, flat[piece])[0]
        return found.to(gradient.dtype)

    def _add(self, out: Tensor, piece: slice, rows: Iterator[Tensor], coefficients: Tensor, groups: Groups) -> None:
        own = groups.within(piece.start, piece.stop, self.shape.numel())
        for expert, row in enumerate(rows):
            own.accumulate(out, row, coefficients[expert : expert + 1])

    def _pieces(self, dtype: torch.dtype) -> Iterator[tuple[slice, Iterator[Tensor]]]:
        """Where each piece is, and its rows, one expert's in memory at a time."""
        # mapped files, or tensors that are in memory anyway
        base, experts = self.base().reshape(-1), [expert().reshape(-1) for expert in self.experts]

        def rows(piece: slice) -> Iterator[Tensor]:
            start = base[piece].to(self.device, dtype)
            for expert in experts:
                yield torch.sub(expert[piece].to(self.device, non_blocking=True), start).to(dtype).unsqueeze(0)

        numel = self.shape.numel()
        size = PIECE if self.device.type == "cpu" else max(numel, 1)  # a device has no use for small operations
        for first in range(0, numel, size):
            piece = slice(first, min(first + size, numel))
            yield piece, rows(piece)
