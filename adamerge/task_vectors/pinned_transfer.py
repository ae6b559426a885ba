"""Pinned transfer: host memory taken in large pieces, and copies from it to a device while the device computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from adamerge.deltas.tuning import PINNED_PIECE

ALIGNMENT = 64


class Arena:
    """Host memory for tensors that are put there one after the other and stay.

    Args:
        total: bytes that will be put, as far as is known: the last piece is no larger than what is left.
        largest: bytes of the largest tensor; a piece holds four, so that at most a quarter of it stays empty.
        pinned: whether a device copies from it without help of the host.
    """

    def __init__(self, total: int, largest: int, pinned: bool) -> None:
        self.left, self.pinned = total, pinned
        self.piece = max(PINNED_PIECE, 4 << max(largest - 1, 0).bit_length())
        self._free = torch.empty(0, dtype=torch.uint8, device="cpu")

    def put(self, tensor: Tensor) -> Tensor:
        """Returns a copy of a tensor in this memory."""
        size = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if size > len(self._free):
            nbytes = max(size, min(self.piece, self.left))
            self._free = torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=self.pinned)
        own, self._free = self._free[: tensor.nbytes], self._free[size:]
        self.left -= size
        return own.view(tensor.dtype).view(tensor.shape).copy_(tensor)


class Conveyor:
    """Brings tensors to a device through buffers that are used in turn, on a stream of its own.

    The host never waits, and runs ahead: the next tensor is on its way while the device computes with this one, also when
    they belong to different merges. A buffer is filled again once the work queued on its last content is done.

    Args:
        device: where to.
        nbytes: of the largest tensor.
        buffers: how many.
    """

    def __init__(self, device: torch.device, nbytes: int, buffers: int = 2) -> None:
        self.device, self._library = device, torch.get_device_module(device)
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(buffers)]
        self._filled = [self._library.Event() for _ in range(buffers)]
        self._done = [self._library.Event() for _ in range(buffers)]
        self._stream = self._library.Stream(device=device) if device.type != "cpu" else self._library.Stream()
        # the buffers' memory may still be in use by what was queued before
        self._stream.wait_stream(self._library.current_stream(device))
        self._turn = 0

    def __call__(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yields each tensor on the device, good until the next one is asked for."""
        for tensor in tensors:
            turn, self._turn = self._turn, (self._turn + 1) % len(self._buffers)
            self._stream.wait_event(self._done[turn])
            with self._library.stream(self._stream):
                there = self._buffers[turn][: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                there.copy_(tensor, non_blocking=True)
                self._filled[turn].record(self._stream)
            current = self._library.current_stream(self.device)
            current.wait_event(self._filled[turn])
            try:
                yield there
            finally:
                self._done[turn].record(current)
