"""The doors: files from outside are checked before anything uses them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from adamerge.errors import CheckpointError
from adamerge.io.pickles import described
from adamerge.io.untrusted_files import opened, parse_object, quoted

if TYPE_CHECKING:
    import torch  # only for annotations: headers are read without it

MAPPED = 1 << 25  # bytes read through one mapping of a file, before the next begins
HEADER_LIMIT = 100_000_000  # bytes, the format's own limit
# bits of one element, by the format's name for it
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32}
BITS |= {"U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
BITS |= {"F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}


def identity(status: os.stat_result) -> tuple[int, int, int]:
    """Returns (size, mtime_ns, inode): when these are the same, the file is taken to be the same."""
    return status.st_size, status.st_mtime_ns, status.st_ino


def cache_folder() -> Path:
    """Returns the folder for what can be computed again: ``$XDG_CACHE_HOME/adamerge``, else ``~/.cache/adamerge``."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    # a relative path there is invalid by the XDG specification, which says to ignore it
    return (Path(root) if os.path.isabs(root) else Path(os.path.expanduser("~"), ".cache")) / "adamerge"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it; ``start`` and ``end`` count bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """Returns the number of elements of the tensor."""
        return math.prod(self.shape)


def _tensor_info(entry: object) -> TensorInfo:
    """Checks one header entry by itself; ValueError says what is wrong with it."""

    def counts(value: object, most: int) -> bool:
        if not isinstance(value, list) or len(value) > most:
            return False
        return all(type(number) is int and 0 <= number < 1 << 63 for number in value)  # True is an int, but not here

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("its entry is not {dtype, shape, data_offsets}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"unknown dtype {quoted(dtype)}")
    if not counts(shape, 64):
        raise ValueError("its shape is not a list of sizes")
    if not counts(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError("its data_offsets are not [start, end]")
    info = TensorInfo(dtype, tuple(shape), *offsets)
    if info.numel * BITS[dtype] != info.nbytes * 8:
        raise ValueError(f"{dtype} of shape {shape} does not take the {info.nbytes} bytes of its data_offsets")
    return info


class TensorFile:
    """One safetensors file, checked whole against its header before any tensor is read.

    Attributes: ``path``; ``tensors``, name to TensorInfo in file order; ``metadata``; ``identity``, (size, mtime_ns,
    inode) when it was opened. Anything but an intact, regular safetensors file is a CheckpointError, and pickles are
    recognised but never opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path).absolute()  # a later change of directory must not point elsewhere
        with opened(self.path) as file:
            self.identity = identity(os.fstat(file.fileno()))
            head = file.read(64)
            length = int.from_bytes(head[:8], "little")
            self._refuse_strangers(head, length)
            self._data = 8 + length
            self._refuse_truncated(self._data)  # before the header is read as JSON, which it is not when cut short
            file.seek(8)
            self._parse(parse_object(file.read(length), f"the header of {quoted(self.path)}"))
        end = self._data + max((info.end for info in self.tensors.values()), default=0)
        self._refuse_truncated(end)
        if self.identity[0] > end:
            what, got = f"{quoted(self.path)} goes on after its last tensor", f"{self.identity[0]} bytes"
            raise CheckpointError(what, expected=f"{end} bytes", got=got)
        self._handle: safe_open | None = None
        self._mapped = 0

    def _refuse_truncated(self, end: int) -> None:
        if self.identity[0] < end:
            expected, got, todo = f"at least {end} bytes", f"{self.identity[0]} bytes", "copy or download it again"
            raise CheckpointError(f"{quoted(self.path)} is truncated", expected=expected, got=got, todo=todo)

    def _refuse_strangers(self, head: bytes, length: int) -> None:
        again = "copy or download it again"
        if head[8:9] == b"{" and length <= HEADER_LIMIT:
            return
        if len(head) < 9:
            reason, todo = f"it is only {len(head)} bytes long", again
        elif head.startswith(b"version https://git-lfs"):
            reason, todo = "it is a git-LFS pointer, a note where the weights are", "run `git lfs pull` in its folder"
        elif head.startswith(b"PK\x03\x04") or (head[0] == 0x80 and 2 <= head[1] <= 5):
            what, todo = described(self.path)
            reason = f"it is {what}, so it was not opened"
        elif length > HEADER_LIMIT:
            reason, todo = f"its header would be {length} bytes, and {HEADER_LIMIT} is the most there can be", again
        else:
            reason, todo = "its header does not begin with '{'", again
        raise CheckpointError(f"{quoted(self.path)} is not a safetensors file: {reason}", todo=todo)

    def _parse(self, header: dict[str, Any]) -> None:
        metadata = header.pop("__metadata__", {})
        self.metadata: dict[str, str] = {} if metadata is None else metadata
        if not isinstance(self.metadata, dict) or not all(isinstance(text, str) for text in self.metadata.values()):
            raise CheckpointError(f"the header of {quoted(self.path)} has '__metadata__' that is not text to text")
        infos: dict[str, TensorInfo] = {}
        for name, entry in header.items():
            try:
                name.encode()  # half a surrogate pair is legal in JSON and nowhere else
                infos[name] = _tensor_info(entry)
            except ValueError as error:
                raise self._corrupt(name, str(error)) from error
        self.tensors: Mapping[str, TensorInfo] = dict(sorted(infos.items(), key=lambda it: (it[1].start, it[1].end)))
        end = 0
        for name, info in self.tensors.items():
            if info.start != end:
                raise self._corrupt(name, f"it starts at byte {info.start}, and the tensor before it ends at {end}")
            end = info.end

    def _corrupt(self, name: str, reason: str) -> CheckpointError:
        what = f"{quoted(self.path)}: tensor {quoted(name)} is wrong in the header: {reason}"
        return CheckpointError(what, todo="copy or download it again")

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{quoted(self.path)} has no tensor {quoted(name)}")
        return self.tensors[name]

    def check_unchanged(self) -> None:
        """Raises CheckpointError when size, time or inode of the file are no longer those at opening."""
        now = None
        with suppress(OSError):
            now = identity(os.stat(self.path))
        if now != self.identity:
            todo = "let nothing write to it during a run, and start again"
            expected, got = f"(size, mtime_ns, inode) = {self.identity}", now or "no file"
            raise CheckpointError(
                f"{quoted(self.path)} changed after it was opened", expected=expected, got=got, todo=todo
            )

    def read(self, name: str) -> torch.Tensor:
        """Returns one tensor, memory-mapped: it takes no memory that the system cannot take back.

        Never write to it: the file would stay as it is, but later reads of the tensor might see what was written.
        A missing name, a changed file, or a dtype that torch lacks is a CheckpointError naming file and tensor.
        """
        self._mapped += self._info(name).nbytes
        if self._mapped > MAPPED:
            # what was read and is held no longer is unmapped: it would count as resident until the system needs room
            self._handle, self._mapped = None, self._info(name).nbytes
        try:
            handle = self._handle = self._handle or safe_open(self.path, framework="pt")
            self.check_unchanged()  # touching a mapped page that was cut off kills the process without a word
            return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{quoted(self.path)}: tensor {quoted(name)} cannot be read: {error}") from error

    def chunks(self, name: str, size: int = 1 << 22) -> Iterator[memoryview]:
        """Yields the bytes of one tensor in file order, each chunk valid until the next.

        Plain reads, so that a file which shrinks meanwhile is a CheckpointError here.
        """
        info = self._info(name)
        buffer = memoryview(bytearray(min(size, info.nbytes)))
        with opened(self.path) as file:
            file.seek(self._data + info.start)
            for left in range(info.nbytes, 0, -size):
                if identity(os.fstat(file.fileno())) != self.identity or file.readinto(buffer[:left]) < min(size, left):
                    raise CheckpointError(f"{quoted(self.path)} changed while tensor {quoted(name)} was read")
                yield buffer[:left]
