"""Writing a weights file: streamed tensor by tensor behind a header that is known before, and read back afterwards."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from adamerge.checkpoint import FORMAT_NAMES
from adamerge.errors import ExportError
from adamerge.files import TensorFile


def write_tensors(
    path: Path, header: Mapping[str, tuple[torch.dtype, torch.Size]], tensors: Iterable[tuple[str, Tensor]]
) -> dict[str, str]:
    """Write a safetensors file; nothing waits in memory.

    Args:
        path: of the file.
        header: dtype and shape of every tensor, by name, in the order of ``tensors``.
        tensors: name and values.

    Returns:
        sha256 of every tensor's bytes, as computed, by name.

    Raises:
        ExportError: it cannot be written.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in header.items():
        start, end = end, end + shape.numel() * dtype.itemsize
        entries[name] = {"dtype": FORMAT_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            return {name: _write_tensor(file, tensor) for name, tensor in tensors}
    except OSError as error:
        raise ExportError(
            f"cannot write {path}: {error.strerror}", todo="free space there, or choose another target"
        ) from error


def verify_tensors(path: Path, hashes: Mapping[str, str]) -> None:
    """Open what was written as a stranger would, and compare every tensor with what was computed.

    Raises:
        ExportError: it does not read back.
    """
    file = TensorFile(path)
    if file.tensors.keys() != hashes.keys():
        raise ExportError(f"{path.name} does not read back: {sorted(file.tensors.keys() ^ hashes.keys())[:10]}")
    for name, expected in hashes.items():
        if hashlib.sha256(_bytes(file.read(name))).hexdigest() != expected:
            raise ExportError(f"{path.name}: '{name}' does not read back as it was written", todo="check the disk")


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write_tensor(file: BinaryIO, tensor: Tensor) -> str:
    content = _bytes(tensor)
    file.write(content)
    return hashlib.sha256(content).hexdigest()
