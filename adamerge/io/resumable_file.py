"""A safetensors file that is written tensor by tensor over several sessions: a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, TextIO

import torch
from torch import Tensor

from adamerge.errors import ExportError
from adamerge.io.atomic import staged_file
from adamerge.io.safetensors_writer import Header, header_bytes, nbytes_of
from adamerge.io.tensor_bytes import tensor_bytes
from adamerge.io.untrusted_files import quoted

CHUNK = 1 << 22  # bytes that are read at a time


class ResumableFile:
    """Writes a safetensors file whose header is known before, one tensor after the other, in the header's order.

    Until ``finish`` the bytes are in a hidden file beside the target, and each tensor's hash in a second one. A later session
    with the same header and metadata takes over all tensors that read back as they were written; any other begins anew. The
    target appears whole or not at all. One process at a time writes a target.

    Args:
        target: the file.
        header: dtype and shape of every tensor, in their order.
        metadata: of the file; whatever the tensors follow from should be in it.

    Attributes:
        done: tensors that are written, those of earlier sessions among them.

    Raises:
        ExportError: it cannot be written.
    """

    def __init__(self, target: Path, header: Header, metadata: Mapping[str, str]) -> None:
        self.target, self.header, self.done = target, header, 0
        self._begin = header_bytes(header, metadata)
        self._partial = target.with_name(f".{target.name}.adamerge-unfinished")
        self._hashes = target.with_name(f".{target.name}.adamerge-written")
        self._key = hashlib.sha256(self._begin).hexdigest()
        self._file: BinaryIO | None = None
        self._log: TextIO | None = None

    def __enter__(self) -> Self:
        """Opens the files, with what earlier sessions have written."""
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            end, kept = self._readable()
            self._log = self._hashes.open("w", encoding="ascii")
            self._log.write("\n".join([self._key, *kept]) + "\n")
            self._log.flush()
            self._file = self._partial.open("r+b" if kept else "w+b")
            if not kept:
                self._file.write(self._begin)
            self._file.truncate(end)
            self._file.seek(end)
            self.done = len(kept)
        except OSError as error:
            self._close()
            raise self._refused(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Closes the files, and leaves what has been written for a later session."""
        self._close()

    def add(self, tensor: Tensor) -> None:
        """Writes the next tensor, of the dtype and shape that the header gives it.

        Raises:
            ExportError: it cannot be written.
        """
        assert self._file is not None and self._log is not None
        name, (dtype, shape) = list(self.header.items())[self.done]
        assert (tensor.dtype, tensor.shape) == (dtype, shape), f"{name}: {tensor.dtype} {tuple(tensor.shape)}"
        content = tensor_bytes(tensor)
        try:
            self._file.write(content)
            self._file.flush()
            # after the bytes: a hash without them is noticed, bytes without a hash are written again
            self._log.write(f"{hashlib.sha256(content).hexdigest()}\n")
            self._log.flush()
        except OSError as error:
            raise self._refused(error) from error
        self.done += 1

    def reader(self, name: str) -> Callable[[], Tensor] | None:
        """Returns what reads a tensor back until the file is finished; None of one that is not written yet."""
        return partial(self._read, name) if name in islice(self.header, self.done) else None

    def finish(self) -> None:
        """Puts the complete file in the target's place.

        Raises:
            ExportError: it cannot be written.
        """
        assert self.done == len(self.header), f"{self.done} of {len(self.header)} tensors"
        self._close()
        with staged_file(self.target) as temporary:
            os.replace(self._partial, temporary)
        with suppress(OSError):
            self._hashes.unlink()

    def _readable(self) -> tuple[int, list[str]]:
        """Returns the end of what earlier sessions wrote and reads back as it was written, and its hashes."""
        end, kept = len(self._begin), list[str]()
        if not (self._partial.is_file() and self._hashes.is_file()):
            return end, kept
        key, *hashes = self._hashes.read_text(encoding="ascii", errors="replace").split("\n")
        with self._partial.open("rb") as file:
            if key != self._key or file.read(end) != self._begin:
                return end, kept
            for digest, (dtype, shape) in zip(hashes, self.header.values(), strict=False):
                nbytes = dtype.itemsize * shape.numel()
                if _hashed(file, nbytes) != digest:
                    break
                end, kept = end + nbytes, [*kept, digest]
        return end, kept

    def _read(self, name: str) -> Tensor:
        before = {one: self.header[one] for one in takewhile(lambda one: one != name, self.header)}
        tensor = torch.empty(self.header[name][1], dtype=self.header[name][0])
        with self._partial.open("rb") as file:  # one of its own: the other is where the next tensor is written
            file.seek(len(self._begin) + nbytes_of(before))
            file.readinto(tensor_bytes(tensor))
        return tensor

    def _close(self) -> None:
        for file in (self._file, self._log):
            if file is not None:
                file.close()
        self._file = self._log = None

    def _refused(self, error: OSError) -> ExportError:
        what = f"{quoted(self.target)} cannot be written: {error.strerror}"
        return ExportError(what, todo="free space there, or choose another --runs")


def _hashed(file: BinaryIO, nbytes: int) -> str | None:
    """Returns the sha256 of the next bytes of a file; None where it ends before."""
    digest = hashlib.sha256()
    while nbytes > 0 and (chunk := file.read(min(CHUNK, nbytes))):
        digest.update(chunk)
        nbytes -= len(chunk)
    return digest.hexdigest() if nbytes == 0 else None
