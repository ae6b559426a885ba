"""Writing weights, in one file or several: streamed piece by piece behind headers that are known before, and read back."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from adamerge.errors import ExportError
from adamerge.io.dtypes import FORMAT_NAMES
from adamerge.io.safetensors_file import TensorFile
from adamerge.io.tensor_bytes import tensor_bytes

AHEAD = 32
"""Pieces, at most, that wait for the disk while further ones are computed."""

Header = Mapping[str, tuple[torch.dtype, torch.Size]]
"""Dtype and shape of every tensor, by name, in the order in which they are written."""


def nbytes_of(header: Header) -> int:
    """Returns the bytes of all tensors."""
    return sum(_nbytes(entry) for entry in header.values())


def write_weights(
    folder: Path,
    name: str,
    header: Header,
    tensors: Iterable[tuple[str, Iterable[Tensor]]],
    most: float = math.inf,
) -> dict[str, dict[str, str]]:
    """Writes safetensors files as transformers does: one, or several and an index beside them.

    Args:
        folder: that they are in.
        name: of the one file; ``model.safetensors`` becomes ``model-00001-of-00002.safetensors`` and so on.
        header: of all tensors.
        tensors: as ``write_tensors`` takes them.
        most: bytes of tensors in a file; a larger tensor has a file of its own.

    Returns:
        File name to what ``write_tensors`` returns of it.

    Raises:
        ExportError: they cannot be written.
    """
    split, coming = list(shards(header, most)), iter(tensors)
    stem = name.removesuffix(".safetensors")
    written = {}
    for number, names in enumerate(split, 1):
        file = name if len(split) == 1 else f"{stem}-{number:05}-of-{len(split):05}.safetensors"
        written[file] = write_tensors(folder / file, {one: header[one] for one in names}, islice(coming, len(names)))
    if len(split) > 1:
        files = {one: file for file, hashes in written.items() for one in hashes}
        index = {"metadata": {"total_size": nbytes_of(header)}, "weight_map": files}
        (folder / f"{name}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return written


def shards(header: Header, most: float) -> Iterator[Sequence[str]]:
    """Yields the names of each file's tensors, in order, of so many bytes at most; a larger tensor has a file of its own."""
    names: list[str] = []
    filled = 0
    for name, entry in header.items():
        if names and filled + _nbytes(entry) > most:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += _nbytes(entry)
    yield names


def _nbytes(entry: tuple[torch.dtype, torch.Size]) -> int:
    dtype, shape = entry
    return shape.numel() * dtype.itemsize


def header_bytes(header: Header, metadata: Mapping[str, str]) -> bytes:
    """Returns what a safetensors file begins with, up to the first tensor's bytes.

    Args:
        header: of the tensors, which follow one another in its order.
        metadata: of the file.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in header.items():
        start, end = end, end + _nbytes((dtype, shape))
        entries[name] = {"dtype": FORMAT_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_tensors(path: Path, header: Header, tensors: Iterable[tuple[str, Iterable[Tensor]]]) -> dict[str, str]:
    """Writes a safetensors file; no more than a few pieces wait in memory.

    Args:
        path: of the file.
        header: of them.
        tensors: name, and the values in consecutive pieces of the flattened tensor.

    Returns:
        sha256 of every tensor's bytes, as computed, by name.

    Raises:
        ExportError: it cannot be written.
    """
    text = header_bytes(header, {"format": "pt"})
    try:
        # written and hashed beside the merging: neither holds Python's lock
        with path.open("wb") as file, ThreadPoolExecutor(1) as writer:
            file.write(text)
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
    """Opens what was written as a stranger would, and compares every tensor with what was computed.

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
        for name, digest in zip(hashes, readers.map(hashed, hashes), strict=True):
            if digest != hashes[name]:
                raise ExportError(f"{path.name}: '{name}' does not read back as it was written", todo="check the disk")
            file.read(name)


def _write_piece(file: BinaryIO, digest: hashlib._Hash, piece: Tensor) -> None:
    content = tensor_bytes(piece)
    file.write(content)
    digest.update(content)
