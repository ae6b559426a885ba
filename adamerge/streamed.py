"""Deltas read from disk: raw tensors, subtracted anew at each read, a small piece of a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from adamerge.deltas import Deltas, room


class StreamedDeltas(Deltas):
    """Deltas of raw tensors, subtracted anew at each read, one expert in memory at a time.

    Args:
        base: gives the base's tensor of this name.
        experts: each gives one expert's tensor of this name.
        shape: of the tensor.
        device: where combinations are computed.
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
        """The same of the tensors as they are mapped now."""
        base, *experts = (partial(_itself, read()) for read in (self.base, *self.experts))
        return StreamedDeltas(base, experts, self.shape, self.device)

    def blocks(self, dtype: torch.dtype, part: slice | None = None) -> Iterator[Tensor]:
        """One block per expert."""
        part = self.whole if part is None else part
        base = self.base().reshape(-1)[part].to(self.device, dtype)
        for expert in self.experts:
            own = expert().reshape(-1)[part].to(self.device, non_blocking=True)
            # the wider dtype of `base` decides, so a half-precision expert is subtracted in `dtype` in one operation
            found = room([1, len(base)], dtype, self.device)
            torch.sub(own, base, out=found[0])
            yield found


def _itself(tensor: Tensor) -> Tensor:
    return tensor
