"""A tensor as bytes: what is hashed, and what is written."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1 << 22
"""Bytes that are handed on at a time, so that a hash begins before a large tensor has been copied to its end."""


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Returns the values of a tensor in their order, of whatever dtype, device and strides; a view where it can be."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def byte_chunks(tensor: Tensor, size: int = CHUNK) -> Iterator[memoryview]:
    """Yields the bytes of a tensor, so many at a time."""
    content = tensor_bytes(tensor)
    for start in range(0, len(content), size):
        yield content[start : start + size]
