"""One model's tensors by on-disk name: headers first, one tensor at a time, all weights read once for a fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import torch

from adamerge.checkpoints.lora_factors import Factors
from adamerge.errors import CheckpointError, ExportError
from adamerge.io.atomic import staged_file
from adamerge.io.dtypes import FORMAT_NAMES, TORCH_DTYPES
from adamerge.io.safetensors_file import TensorFile, cache_folder
from adamerge.io.tensor_bytes import byte_chunks
from adamerge.io.untrusted_files import listed, quoted, read_json

MERGEABLE: frozenset[torch.dtype] = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})

# a float is NaN or Inf exactly when all bits of its exponent are set: looked up in the bits, in any chunk at any speed
_EXPONENTS = {"F64": ("<u8", 0x7FF << 52), "F32": ("<u4", 0xFF << 23), "F16": ("<u2", 0x1F << 10)}
_EXPONENTS |= {"BF16": ("<u2", 0xFF << 7)}

_SETTLED = 2.0  # seconds after which a second write is sure to give another mtime, on the coarsest clocks


class _NoSuchTensor(CheckpointError, KeyError):
    """A name the checkpoint lacks: typed for the user, and a KeyError because a Mapping promises one."""

    __str__ = Exception.__str__  # KeyError would print the message quoted


@dataclass(frozen=True)
class Scan:
    """What one pass over all bytes finds: the fingerprint, and how many values of which tensors are NaN or Inf."""

    fingerprint: str
    nonfinite: Mapping[str, int]


class Checkpoint(Mapping[str, torch.Tensor]):
    """One model's tensors by on-disk name, in sorted order; ``location`` is what errors print.

    ``sources`` are the files it reads, none when it is in memory. Tensors are for reading: whoever writes to one may
    write to what others see. Compare two checkpoints by ``fingerprint``; ``==`` asks whether they are one object.
    """

    location: str
    sources: tuple[Path, ...] = ()
    note: str = ""  # what else a reader of an exported model's card should know of it
    _entries: Mapping[str, Any]  # by name, in order: where each tensor is
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other  # Mapping's own would read and compare all tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own would read the tensor

    @abstractmethod
    def shape(self, name: str) -> torch.Size:
        """Returns the shape of one tensor without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of one tensor without reading it; CheckpointError if torch has none such."""

    def factors(self, name: str) -> Factors | None:
        """Returns what one tensor adds to its base's as factors that are read later; None where it is a whole tensor."""
        return None

    def delta(self, name: str) -> Callable[[], torch.Tensor] | None:
        """Returns what reads the delta of one tensor to its base's, where such are stored; None where whole tensors are."""
        return None

    def own_name(self, name: str) -> str:
        """Returns what the tensor is called where it is stored."""
        return name

    @abstractmethod
    def _stored(self, name: str) -> tuple[str, tuple[int, ...], Iterator[memoryview]]:
        """Returns dtype and shape as the format writes them, and the bytes."""

    @cached_property
    def _scanned(self) -> Scan:
        return self._pass()

    def scan(self) -> Scan:
        """Returns fingerprint and non-finite counts; the first call passes once over the bytes, tensor by tensor."""
        return self._scanned

    @property
    def fingerprint(self) -> str:
        """Hash of all names, dtypes, shapes and values: the same however they are cut into files and named."""
        return self.scan().fingerprint

    def check(self) -> None:
        """Raises CheckpointError when weights are NaN or Inf, or a file changed since it was opened."""
        nonfinite = self.scan().nonfinite
        if nonfinite:
            some = ", ".join(f"{quoted(name)} ({nonfinite[name]})" for name in sorted(nonfinite)[:10])
            more = f" and {len(nonfinite) - 10} more" if len(nonfinite) > 10 else ""
            what = f"{quoted(self.location)} has NaN or Inf in {len(nonfinite)} of {len(self)} tensors: {some}{more}"
            raise CheckpointError(what, todo="use an earlier checkpoint of that training, or exclude these tensors")

    def _pass(self) -> Scan:
        with ThreadPoolExecutor(torch.get_num_threads()) as readers:  # hashing and counting hold no lock of Python's
            digests, counts = zip(*readers.map(self._pass_one, self), strict=True)
        nonfinite = {name: count for name, count in zip(self, counts, strict=True) if count}
        return Scan(hashlib.sha256(b"".join(sorted(digests))).hexdigest(), nonfinite)

    def _pass_one(self, name: str) -> tuple[bytes, int]:
        """Hash of one tensor, and how many of its values are NaN or Inf."""
        dtype, shape, chunks = self._stored(name)
        digest = hashlib.sha256(json.dumps([name, dtype, shape]).encode() + b"\n")
        word, exponent = _EXPONENTS.get(dtype, ("", 0))
        count = 0
        for chunk in chunks:
            digest.update(chunk)
            if word:
                bits = numpy.frombuffer(chunk, word) & numpy.array(exponent, word)
                if bits.max() == exponent:
                    count += int((bits == exponent).sum())
        return digest.digest(), count

    def _entry(self, name: str) -> Any:
        if name not in self._entries:
            raise _NoSuchTensor(f"{quoted(self.location)} has no tensor {quoted(name)}")
        return self._entries[name]


class SafetensorsCheckpoint(Checkpoint):
    """The tensors of one or more safetensors files, memory-mapped; no two files may hold the same name."""

    def __init__(self, location: str, files: Sequence[TensorFile]) -> None:
        self.location, self._files = location, tuple(files)
        self.sources = tuple(file.path for file in files)
        homes: dict[str, TensorFile] = {}
        for file in files:
            twice = homes.keys() & file.tensors.keys()
            if twice:
                raise CheckpointError(f"{quoted(location)} holds tensors twice: {listed(twice)}", where=file.path)
            homes |= dict.fromkeys(file.tensors, file)
        if not homes:
            raise CheckpointError(f"{quoted(location)} holds no tensors")
        self._entries = {name: homes[name] for name in sorted(homes)}

    def __getitem__(self, name: str) -> torch.Tensor:
        self.dtype(name)  # refuses what torch lacks, in words of ours
        return self._entries[name].read(name)

    def shape(self, name: str) -> torch.Size:
        """Returns the shape that torch gives the tensor."""
        info = self._entry(name).tensors[name]
        # torch packs two F4 into each element
        return torch.Size((*info.shape[:-1], info.shape[-1] // 2) if info.dtype == "F4" and info.shape else info.shape)

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of one tensor; CheckpointError if torch has none such."""
        file = self._entry(name)
        known = TORCH_DTYPES.get(file.tensors[name].dtype)
        if known is None:
            what = f"{quoted(file.path)}: tensor {quoted(name)} has dtype {file.tensors[name].dtype}, which torch lacks"
            raise CheckpointError(what, todo="exclude it, or use a checkpoint that is not quantised")
        return known

    def _stored(self, name: str) -> tuple[str, tuple[int, ...], Iterator[memoryview]]:
        file = self._entry(name)
        return file.tensors[name].dtype, file.tensors[name].shape, file.chunks(name)

    def scan(self) -> Scan:
        """Returns fingerprint and non-finite counts; a good result stays on disk while the files stay the same."""
        for file in self._files:
            file.check_unchanged()
        return self._scanned

    @cached_property
    def _scanned(self) -> Scan:
        key = sorted([os.path.realpath(file.path), *file.identity] for file in self._files)
        remembered = cache_folder() / "scans" / f"{_seal(key)[:32]}.json"
        with suppress(CheckpointError):
            entry = read_json(remembered, limit=1_000_000)
            # the seal finds torn and edited entries; the key itself is compared, since file names are only hashes
            if entry.pop("seal", None) == _seal(entry) and entry["files"] == key:
                return Scan(str(entry["fingerprint"]), {})
        settled = time.time() - max(file.identity[1] for file in self._files) / 1e9 > _SETTLED
        scan = self._pass()
        for file in self._files:
            file.check_unchanged()
        # a file younger than the clock's grain can change again and keep its mtime, so it is read again next time
        if not scan.nonfinite and settled:
            entry = {"files": key, "fingerprint": scan.fingerprint}
            with suppress(ExportError), staged_file(remembered) as temporary:  # without a cache all works, slower
                temporary.write_text(json.dumps(entry | {"seal": _seal(entry)}))
        return scan


class StateDict(Checkpoint):
    """The tensors of a mapping in memory, detached, on the host; tensors that share storage under two names count as two."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.location = "the state dict in memory"
        for name, tensor in tensors.items():
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
                got = f"{type(name).__name__} -> {type(tensor).__name__}"
                raise CheckpointError(f"{self.location} has {quoted(name)}", expected="str -> torch.Tensor", got=got)
            if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in FORMAT_NAMES:
                state = "on the meta device" if tensor.is_meta else f"{tensor.layout} {tensor.dtype}"
                raise CheckpointError(f"tensor {quoted(name)} of {self.location} has no plain values: it is {state}")
        if not tensors:
            raise CheckpointError(f"{self.location} holds no tensors")
        self._entries = {name: tensors[name].detach().cpu() for name in sorted(tensors)}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._entry(name)

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of one tensor."""
        return self[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of one tensor."""
        return self[name].dtype

    def _stored(self, name: str) -> tuple[str, tuple[int, ...], Iterator[memoryview]]:
        tensor, shape = self[name], tuple(self[name].shape)
        if tensor.dtype == torch.float4_e2m1fn_x2 and shape:
            shape = (*shape[:-1], shape[-1] * 2)
        return FORMAT_NAMES[tensor.dtype], shape, byte_chunks(tensor)


def _seal(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
