"""Memory: what task vectors would take, told from headers alone, and what this machine has left."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from adamerge.deltas.quantized import Code
from adamerge.deltas.tuning import PIECE, STORED_PIECE
from adamerge.task_vectors.task_vectors import TaskVectors

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
FP32 = 4  # bytes
TRANSFORMED = 3
"""Tensors of every expert that a transform has in memory at once: what it takes, what is on the way, what it gives."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the host's anonymous memory and of a device's.

    Memory-mapped files are not counted: the system takes their pages back when it needs them.
    """

    host: int = 0
    device: int = 0

    @classmethod
    def of(cls, nbytes: int, device: torch.device) -> Memory:
        """Returns bytes on ``device``, which is the host itself when it is the CPU."""
        return cls(host=nbytes) if device.type == "cpu" else cls(device=nbytes)

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.host + other.host, self.device + other.device)

    def fits(self, there: Available, margin: float) -> bool:
        """Returns whether it is available, and a fraction ``margin`` stays free; what is unknown suffices."""
        pairs = ((self.host, there.host), (self.device, there.device))
        return all(has is None or needs <= (1 - margin) * has for needs, has in pairs)


@dataclass(frozen=True)
class Available:
    """Bytes that can still be taken; None where the system does not say.

    Attributes:
        host: without swapping, and within the limit of the control group: that of this process alone where several
            processes share the machine.
        device: free, or reserved by this process and unused; 0 when the device is the CPU.
    """

    host: int | None
    device: int | None

    @classmethod
    def on(cls, device: torch.device, local_world_size: int | None = None) -> Available:
        """Returns the memory that is there now, on the device and the host.

        Args:
            device: of the merges.
            local_world_size: processes that share this machine's memory; those of this run that are known of, when None.
        """
        free = [nbytes for nbytes in (_free_host(PROC), _free_group(PROC, CGROUPS)) if nbytes is not None]
        share = min(free) // (local_world_size or _local_world_size()) if free else None
        if device.type == "cpu":
            return cls(share, 0)
        if device.type != "cuda" or not torch.cuda.is_available():
            return cls(share, None)
        unused, _ = torch.cuda.mem_get_info(device)
        return cls(share, unused + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


@dataclass(frozen=True)
class Sizes:
    """Numbers of elements that task vectors consist of, and how they are read.

    Attributes:
        experts: after the transforms.
        tensors: merged ones: name to elements.
        dense: of each, elements of dense deltas of all experts.
        factors: elements of low-rank factors, of all tensors and experts.
        factored: of these the ones of the tensor that has most.
        base_bytes: of the base's merged tensors, as stored.
        narrow: whether the base's tensors are widened when they are read.
        transformed: whether all experts' deltas of what is read are in memory at once.
        divisible: whether a piece of a tensor is read by itself.
        started: elements of the tensors that a start changes.
    """

    experts: int
    tensors: Mapping[str, int]
    dense: Mapping[str, int]
    factors: int
    base_bytes: int
    narrow: bool
    transformed: bool
    divisible: bool
    started: tuple[int, ...] = ()
    factored: int = 0

    @classmethod
    def of(cls, vectors: TaskVectors) -> Sizes:
        """Returns the sizes of task vectors, from headers; reads nothing and learns nothing."""
        tensors = {name: vectors.shape(name).numel() for name in vectors}
        deltas = {name: vectors.unlearned(name) for name in vectors}
        elements = {name: own.elements(len(vectors.experts)) for name, own in deltas.items()}
        dtypes = {name: vectors.base.dtype(name) for name in vectors}
        return cls(
            experts=len(vectors.experts),
            tensors=tensors,
            dense={name: dense for name, (dense, _) in elements.items()},
            factors=sum(factors for _, factors in elements.values()),
            base_bytes=sum(tensors[name] * dtype.itemsize for name, dtype in dtypes.items()),
            narrow=any(dtype != torch.float32 for dtype in dtypes.values()),
            transformed=bool(vectors.transforms),
            divisible=all(own.divisible for own in deltas.values()),
            factored=max((factors for _, factors in elements.values()), default=0),
            started=tuple(tensors[name] for name in vectors if vectors.starts(name)),
        )

    @property
    def merged(self) -> int:
        """Returns the number of elements of all merged tensors."""
        return sum(self.tensors.values())

    @property
    def largest(self) -> int:
        """Returns the number of elements of the largest merged tensor."""
        return max(self.tensors.values(), default=0)

    def read(self, device: torch.device) -> int:
        """Returns the most elements that are read at once for sums on ``device``, of each expert."""
        return min(self.largest, PIECE) if self.divisible and device.type == "cpu" else self.largest

    def dense_bytes(self, code: Code) -> int:
        """Returns the bytes of all dense deltas in this code, a start's too; each expert's tensor is encoded by itself."""
        experts = sum(
            dense // numel * code.nbytes(numel)
            for numel, dense in zip(self.tensors.values(), self.dense.values(), strict=True)
            if numel
        )
        return experts + sum(map(code.nbytes, self.started))

    def beside_rows(self, device: torch.device) -> int:
        """Returns the bytes that sums take for a moment beside experts' rows.

        A start's row and its sum with an update; of factors their product, or the products with a gradient.
        """
        elements = 2 * self.read(device) if self.started else 0
        if self.factored:
            elements += max(self.largest, min(self.factored, STORED_PIECE))
            elements += 0 if device.type == "cpu" else self.factored  # times coefficients: on a CPU a few at a time
        return FP32 * elements

    def transform_bytes(self, read: int) -> int:
        """Returns the bytes that a transform takes while deltas are read once, beyond a gradient that is not there by then.

        Args:
            read: elements that are read at once, of each expert.
        """
        return max(0, FP32 * (TRANSFORMED * self.experts * read - self.merged)) if self.transformed else 0

    def base_memory(self, device: torch.device) -> Memory:
        """Returns the memory of the base's merged tensors, which stay as they were opened on a CPU, or move to a device."""
        return Memory() if device.type == "cpu" else Memory(device=self.base_bytes)


def size(nbytes: int | None) -> str:
    """Formats bytes for people, such as 1.50 GiB."""
    if nbytes is None:
        return "?"
    unit = max(power for power in range(4) if nbytes >= 1024**power or power == 0)
    return f"{nbytes / 1024**unit:.{2 if unit else 0}f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


def _local_world_size() -> int:
    """Returns how many processes of this run are on this machine, as far as they have been told of each other."""
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    if local.isdecimal() and int(local) > 0:
        return int(local)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def _free_host(proc: Path) -> int | None:
    """Returns ``MemAvailable``: free, or in caches that can be dropped."""
    for line in _lines(proc / "meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _free_group(proc: Path, root: Path) -> int | None:
    """Returns what the limits of this process's control group and of those around it leave; None where there are none."""
    limits = []
    for line in _lines(proc / "self" / "cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0":
            top, names = root, ("memory.max", "memory.current", "inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            top = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
        else:
            continue
        folder = top / path.strip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(top):
                break
            left = _left(group, *names)
            if left is not None:
                limits.append(left)
    return min(limits, default=None)


def _left(group: Path, limit: str, usage: str, *caches: str) -> int | None:
    """Returns the limit of one control group less what it uses and cannot drop."""
    most, used = _lines(group / limit), _lines(group / usage)
    if not most or not used or not most[0].isdecimal():
        return None  # "max", or no such file
    statistics = dict(line.split() for line in _lines(group / "memory.stat") if len(line.split()) == 2)
    cached = sum(int(statistics.get(name, 0)) for name in caches)
    return max(0, int(most[0]) - max(0, int(used[0]) - cached))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
