"""Writing a weights file: streamed piece by piece behind a header that is known before, and read back afterwards."""

from __future__ import annotations

import hashlib
import json
import struct
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from adamerge.checkpoint import FORMAT_NAMES
from adamerge.errors import ExportError
from adamerge.files import TensorFile

AHEAD = 32
"""Pieces, at most, that wait for the disk while further ones are computed."""


def write_tensors(
    path: Path, header: Mapping[str, tuple[torch.dtype, torch.Size]], tensors: Iterable[tuple[str, Iterable[Tensor]]]
) -> dict[str, str]:
    """Write a safetensors file; no more than a few pieces wait in memory.

    Args:
        path: of the file.
        header: dtype and shape of every tensor, by name, in the order of ``tensors``.
        tensors: name, and the values in consecutive pieces of the flattened tensor.

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
        # written and hashed beside the merging: neither holds Python's lock
        with path.open("wb") as file, ThreadPoolExecutor(1) as writer:
            file.write(struct.pack("<Q", len(text)) + text)
            digests = {name: hashlib.sha256() for name in header}
            waiting: deque[Future[None]] = deque()
            for name, pieces in tensors:
                for piece in pieces:
                    waiting.append(writer.submit(_write_piece, file, digests[name], piece))
                    if len(waiting) > AHEAD:
                        waiting.popleft().result()
            for written in waiting:
                written.result()
            return {name: digest.hexdigest() for name, digest in digests.items()}
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

    def hashed(name: str) -> str:
        digest = hashlib.sha256()
        for chunk in file.chunks(name):
            digest.update(chunk)
        return digest.hexdigest()

    with ThreadPoolExecutor(torch.get_num_threads()) as readers:
        for name, found in zip(hashes, readers.map(hashed, hashes), strict=True):
            if found != hashes[name]:
                raise ExportError(f"{path.name}: '{name}' does not read back as it was written", todo="check the disk")
            file.read(name)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write_piece(file: BinaryIO, digest: hashlib._Hash, piece: Tensor) -> None:
    content = _bytes(piece)
    file.write(content)
    digest.update(content)
