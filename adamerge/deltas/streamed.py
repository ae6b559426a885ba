"""Deltas read from disk, a small piece of a tensor at a time: raw tensors subtracted anew, or deltas stored as such."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from adamerge.deltas.base import Deltas
from adamerge.deltas.row_buffers import filled, made_at_once, room


class StreamedDeltas(Deltas):
    """Deltas of raw tensors, subtracted anew at each read, a few experts in memory at a time.

    Args:
        base: gives the base's tensor of this name.
        experts: each gives one expert's tensor of this name.
        shape: of the tensor.
        device: where sums are computed.
    """

    divisible = True  # mapped files, or tensors that are in memory anyway

    def __init__(
        self,
        base: Callable[[], Tensor],
        experts: Sequence[Callable[[], Tensor]],
        shape: torch.Size,
        device: torch.device,
    ) -> None:
        self.base, self.experts, self.shape, self.device = base, experts, shape, device

    def opened(self) -> Deltas:
        """Returns deltas of the tensors as they are mapped now, so that no file is opened again."""
        base, *experts = (partial(_itself, read()) for read in (self.base, *self.experts))
        return StreamedDeltas(base, experts, self.shape, self.device)

    def row_batches(self, dtype: torch.dtype, part: slice | None = None) -> Iterator[Tensor]:
        """Yields the rows of a few experts, in memory that is used again for the next few."""
        return self._subtracted(dtype, part, made_at_once(len(self.experts), self.device))

    def rows(self, dtype: torch.dtype, part: slice | None = None) -> Tensor:
        """Returns the rows of all experts, subtracted into one tensor."""
        return next(self._subtracted(dtype, part, len(self.experts)))

    def _subtracted(self, dtype: torch.dtype, part: slice | None, at_once: int) -> Iterator[Tensor]:
        part = self.whole if part is None else part
        base = self.base().reshape(-1)[part]
        base = base.to(self.device, torch.promote_types(base.dtype, dtype))
        rows = room([at_once, len(base)], dtype, self.device)

        def subtract(expert: Callable[[], Tensor], row: Tensor) -> None:
            own = expert().reshape(-1)[part].to(self.device, non_blocking=True)
            # the wider dtype of `base` decides, so a half-precision expert is subtracted in `dtype` in one operation
            torch.sub(own, base, out=row)

        return filled(self.experts, rows, subtract)


class StoredDeltas(Deltas):
    """Deltas that files hold as such, read anew each time, a few experts in memory at a time.

    Args:
        experts: each gives one expert's delta of this name.
        shape: of the tensor.
        device: where sums are computed.
    """

    divisible = True

    def __init__(self, experts: Sequence[Callable[[], Tensor]], shape: torch.Size, device: torch.device) -> None:
        self.experts, self.shape, self.device = experts, shape, device

    def opened(self) -> Deltas:
        """Returns deltas of the tensors as they are mapped now, so that no file is opened again."""
        return StoredDeltas([partial(_itself, read()) for read in self.experts], self.shape, self.device)

    def row_batches(self, dtype: torch.dtype, part: slice | None = None) -> Iterator[Tensor]:
        """Yields the rows of a few experts, in memory that is used again for the next few."""
        part = self.whole if part is None else part
        at_once = made_at_once(len(self.experts), self.device)
        rows = room([at_once, part.stop - part.start], dtype, self.device)

        def read(expert: Callable[[], Tensor], row: Tensor) -> None:
            row.copy_(expert().reshape(-1)[part], non_blocking=True)

        return filled(self.experts, rows, read)


def _itself(tensor: Tensor) -> Tensor:
    return tensor
