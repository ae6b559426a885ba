"""Products of factors, ``left diag(scale) right``, with the same bits for any number of a CPU's threads, and their slopes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from adamerge.deltas.tuning import STORED_PIECE, TERMS


def product(left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """Returns ``left diag(scale) right``, ``(rows, columns)``.

    What is exported must be what was learned, also on a machine with other threads. A CPU's library chooses by the number of
    threads in which order a sum is added up, so it gets one here, and takes as long as one core does.

    Args:
        left: ``(rows, n)``.
        right: ``(n, columns)``.
        scale: ``(n,)``.
    """
    own = left * scale
    if left.device.type != "cpu":
        return torch.mm(own, right)
    with _one_thread():
        return torch.mm(own, right)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Lets a CPU's libraries use one thread."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def slopes(left: Tensor, gradient: Tensor, right: Tensor) -> Tensor:
    """Returns ``left[:, j]^T G right[j]`` of each component, ``(n,)``, for the gradient ``G`` of their product.

    Args:
        left: ``(rows, n)``.
        gradient: ``(rows, columns)``.
        right: ``(n, columns)``.
    """
    few = max(TERMS, STORED_PIECE // max(right.shape[1], 1))  # else it would take the memory of all factors again
    parts = [
        (left[:, at : at + few].t() @ gradient).mul_(right[at : at + few]).sum(dim=1)
        for at in range(0, len(right), few)
    ]
    return parts[0] if len(parts) == 1 else torch.cat([right.new_empty(0), *parts])
