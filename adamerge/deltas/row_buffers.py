"""Row buffers: memory for the deltas of a few experts, which are made there before they are added up or multiplied."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy
import torch
from torch import Tensor

from adamerge.deltas.tuning import FEW

Source = TypeVar("Source")


def made_at_once(experts: int, device: torch.device) -> int:
    """Returns how many of so many experts have their rows made before they are added up.

    As many as are added at once on a CPU; one on a device, to spare its memory.
    """
    return min(experts, FEW if device.type == "cpu" else 1)


def room(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor with nothing in it yet.

    On a CPU it is numpy's: the C library uses again what numpy frees, while torch's allocations are aligned in a way that
    makes glibc take new memory for each; and numpy asks the system for large pages, which take less time to read.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or nbytes == 0:
        return torch.empty(*shape, dtype=dtype, device=device)
    return torch.from_numpy(numpy.empty(nbytes, dtype=numpy.uint8)).view(dtype).view(*shape)


def filled(sources: Iterable[Source], rows: Tensor, fill: Callable[[Source, Tensor], object]) -> Iterator[Tensor]:
    """Yields batches of as many experts as there are rows, which are used again for the next; the last may be smaller.

    Args:
        sources: of the experts, one after the other.
        rows: room for the experts of a batch.
        fill: makes one expert's row, in place.
    """
    made = 0
    for source in sources:
        fill(source, rows[made])
        made += 1
        if made == len(rows):
            yield rows
            made = 0
    if made:
        yield rows[:made]
