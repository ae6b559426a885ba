"""Storage: where the deltas are between merges, and in how many bits; always combined and contracted in fp32."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from adamerge.deltas.base import Deltas, DenseDeltas
from adamerge.deltas.quantized import Blockwise, EncodedDeltas, Floats
from adamerge.deltas.row_buffers import made_at_once, room
from adamerge.errors import ConfigError
from adamerge.io.dtypes import torch_dtype
from adamerge.task_vectors.memory import FP32, TRANSFORMED, Available, Memory, Sizes
from adamerge.task_vectors.pinned_transfer import Arena, Conveyor
from adamerge.task_vectors.task_vectors import TaskVectors

MARGIN = 0.2
"""Fraction of the available memory that stays free beside what a plan counts: what activations take is not known before."""


class Storage(ABC):
    """Where task vectors are while coefficients are learned, and in how many bits.

    Factors of LoRA experts stay factors in fp32, whatever the storage. What is exported never depends on the storage: the
    export reads base and experts themselves.

    Attributes:
        margin: fraction of the available memory that a plan leaves free.
    """

    margin: float = MARGIN

    @property
    def rounding(self) -> str:
        """Returns by how much a delta may be rounded, as tables write it."""
        return "none"

    @abstractmethod
    def place(self, vectors: TaskVectors, device: torch.device) -> TaskVectors:
        """Returns the same task vectors, for merges on ``device``."""

    @abstractmethod
    def footprint(self, sizes: Sizes, device: torch.device) -> Memory:
        """Returns what stays in memory between merges."""

    @abstractmethod
    def transient(self, sizes: Sizes, device: torch.device) -> Memory:
        """Returns what one tensor needs for a moment, beside the gradient of the merged copy."""

    def needs(self, sizes: Sizes, device: torch.device) -> Memory:
        """Returns the memory that stays plus the memory needed for a moment."""
        return self.footprint(sizes, device) + self.transient(sizes, device)

    def chosen(self, sizes: Sizes, device: torch.device, there: Available, beside: Memory) -> Storage:
        """Returns the storage that will be used: this one, unless it stands for several.

        Args:
            sizes: of the task vectors.
            device: of the merges.
            there: memory that is available.
            beside: what else will be taken of it.
        """
        return self

    def __str__(self) -> str:
        given = ", ".join(str(value) for value in vars(self).values())
        return f"{type(self).__name__}({given})"


class Resident(Storage):
    """All deltas on the device, experts x size of the model, and the base's merged tensors with them.

    Exact in float32. In bfloat16 each delta is rounded by at most 2^-8 of itself, in float16 by 2^-11 of itself or 2^-25,
    whichever is larger; products and sums are in fp32 in any case, so a merged weight is off by at most that fraction of
    ``sum_k |c_k tau_k|``, and the exported one, which is exact, differs by so much from the one that was trained.

    Args:
        dtype: of the deltas: float32, bfloat16 or float16.

    Raises:
        ConfigError: there is no such dtype; later, a delta beyond 65504 in float16.
    """

    def __init__(self, dtype: str = "float32") -> None:
        _floats(dtype)  # refuses what is none
        self.dtype = dtype

    @property
    def rounding(self) -> str:
        """Returns by how much a delta may be rounded, relative to itself."""
        return _ROUNDING[self.dtype]

    def place(self, vectors: TaskVectors, device: torch.device) -> TaskVectors:
        """Reads everything once, and stores it on the device."""
        return vectors.in_memory(device, self._store, lambda base: base.to(device))

    def footprint(self, sizes: Sizes, device: torch.device) -> Memory:
        """Returns the memory of deltas and base; a base that is mapped from a file takes nothing on the CPU."""
        deltas = sizes.dense_bytes(_floats(self.dtype)) + FP32 * sizes.factors
        return Memory.of(deltas, device) + sizes.base_memory(device)

    def transient(self, sizes: Sizes, device: torch.device) -> Memory:
        """Returns the memory of a few experts' widened deltas, or that of a transform when they are read once."""
        if self.dtype == "float32":
            return Memory.of(sizes.transform_bytes(sizes.read(device)) + sizes.beside_rows(device), device)
        widened = FP32 * made_at_once(sizes.experts, device) * sizes.read(device)
        return Memory.of(max(widened, sizes.transform_bytes(sizes.largest)) + sizes.beside_rows(device), device)

    def _store(self, deltas: Deltas, count: int) -> Deltas:
        if self.dtype != "float32":
            return EncodedDeltas.of(deltas, _floats(self.dtype), lambda row: row)
        numel = deltas.shape.numel()
        values = room([count, numel], torch.float32, deltas.device)
        for piece, opened in deltas.in_pieces():
            first = 0
            for rows in opened.row_batches(torch.float32, piece):
                values[first : first + len(rows), piece] = rows
                first += len(rows)
        return DenseDeltas(values.view(count, *deltas.shape))


class LowBit(Storage):
    """All deltas on the device, as integers of 8 or 4 bits with an fp32 scale for every 64 of them: 8.5 or 4.5 bits each.

    A delta is off by at most 1/254 (8 bits) or 1/14 (4 bits) of the largest of its block of 64 in the flattened tensor.
    Merged and exported weights differ as those of ``Resident`` in bfloat16 do.

    Args:
        bits: 8 or 4.

    Raises:
        ConfigError: bits is neither.

    Reference: LLM.int8() (Dettmers et al., 2022), https://arxiv.org/abs/2208.07339, for absmax quantisation; per block as in
    8-bit Optimizers (Dettmers et al., 2022), https://arxiv.org/abs/2110.02861.
    """

    def __init__(self, bits: int = 8) -> None:
        if bits not in {8, 4}:
            raise ConfigError(f"LowBit: bits must be 8 or 4, got {bits}")
        self.bits = bits

    @property
    def rounding(self) -> str:
        """Returns by how much a delta may be rounded, relative to the largest of its block of 64."""
        return f"1/{254 if self.bits == 8 else 14} of a block"

    def place(self, vectors: TaskVectors, device: torch.device) -> TaskVectors:
        """Reads all task vectors once and encodes them in few bits."""
        code = Blockwise(self.bits)
        return vectors.in_memory(
            device, lambda deltas, _: EncodedDeltas.of(deltas, code, lambda row: row), lambda base: base.to(device)
        )

    def footprint(self, sizes: Sizes, device: torch.device) -> Memory:
        """Returns the memory of integers and scales, and of the base."""
        deltas = sizes.dense_bytes(Blockwise(self.bits)) + FP32 * sizes.factors
        return Memory.of(deltas, device) + sizes.base_memory(device)

    def transient(self, sizes: Sizes, device: torch.device) -> Memory:
        """Returns the memory of a few experts' decoded deltas and one's integers, or that of a transform at the one read."""
        decoded = (FP32 * made_at_once(sizes.experts, device) + 1) * sizes.read(device)
        return Memory.of(max(decoded, sizes.transform_bytes(sizes.largest)) + sizes.beside_rows(device), device)


class Pinned(Storage):
    """Deltas and base in page-locked host memory; copied to the device expert by expert while it computes.

    The device holds two tensors of one expert at a time. Exact in float32, else as ``Resident``, which it is on the CPU.

    Args:
        dtype: of the deltas: float32, bfloat16 or float16.

    Raises:
        ConfigError: there is no such dtype; later, a delta beyond 65504 in float16.
    """

    def __init__(self, dtype: str = "float32") -> None:
        _floats(dtype)  # refuses what is none
        self.dtype = dtype

    @property
    def rounding(self) -> str:
        """Returns by how much a delta may be rounded, relative to itself."""
        return _ROUNDING[self.dtype]

    def place(self, vectors: TaskVectors, device: torch.device) -> TaskVectors:
        """Reads all task vectors once, into pinned host memory."""
        if device.type == "cpu":
            return Resident(self.dtype).place(vectors, device)
        return self.placed(vectors, device, pinned=True)

    def placed(self, vectors: TaskVectors, device: torch.device, pinned: bool) -> TaskVectors:
        """Returns what ``place`` does, also for a device that needs no pinned memory."""
        sizes, code = Sizes.of(vectors), _floats(self.dtype)
        largest = code.nbytes(sizes.largest)
        arena = Arena(sizes.dense_bytes(code) + sizes.base_bytes, largest, pinned)
        carry = Conveyor(device, largest)
        return vectors.in_memory(device, lambda deltas, _: EncodedDeltas.of(deltas, code, arena.put, carry), arena.put)

    def footprint(self, sizes: Sizes, device: torch.device) -> Memory:
        """Returns up to a quarter more than the deltas on the host; two tensors and the factors on the device."""
        if device.type == "cpu":
            return Resident(self.dtype).footprint(sizes, device)
        code = _floats(self.dtype)
        there = sizes.dense_bytes(code) + sizes.base_bytes
        return Memory(there + there // 4, 2 * code.nbytes(sizes.largest) + FP32 * sizes.factors)

    def transient(self, sizes: Sizes, device: torch.device) -> Memory:
        """Returns what ``Resident`` needs for a moment, and the memory of the base's tensor on its way."""
        base = Memory.of(0 if device.type == "cpu" else FP32 * sizes.largest, device)
        return Resident(self.dtype).transient(sizes, device) + base


class Disk(Storage):
    """Keeps nothing in memory: base and experts are memory-mapped, and read anew at each merge and contraction.

    Exact. As many experts as the disk holds; as fast as the system's page cache or the disk.
    """

    def place(self, vectors: TaskVectors, device: torch.device) -> TaskVectors:
        """Leaves the experts on disk; only sets the device."""
        return vectors.to(device)

    def footprint(self, sizes: Sizes, device: torch.device) -> Memory:
        """Returns no memory, since nothing stays."""
        return Memory()

    def transient(self, sizes: Sizes, device: torch.device) -> Memory:
        """Returns the memory of a few experts' deltas, or of all experts' where a transform looks across them."""
        copies = 2 if device.type != "cpu" else 1 if sizes.narrow else 0
        copies += TRANSFORMED * sizes.experts if sizes.transformed else made_at_once(sizes.experts, device)
        read = FP32 * (copies * sizes.read(device) + sizes.factored)
        return Memory.of(read + sizes.beside_rows(device), device)


_ROUNDING = {"float32": "none", "bfloat16": "2^-8", "float16": "2^-11"}


def _floats(dtype: str) -> Floats:
    return Floats(torch_dtype(dtype, "storage"))
