"""Quantised deltas: read once and stored in memory, in fewer bits where that is wanted; decoded a few experts at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from adamerge.deltas.base import Deltas
from adamerge.deltas.row_buffers import filled, made_at_once, room
from adamerge.deltas.tuning import PIECE
from adamerge.errors import ConfigError

BLOCK = 64
"""Numbers that share a scale in few bits: small enough that one outlier spoils little, and a scale is half a bit each."""


class Code(ABC):
    """How the numbers of one expert's delta of one tensor are stored.

    Attributes:
        plain: whether they are stored as they are, in some dtype.
    """

    plain: bool = False

    @abstractmethod
    def room(self, numel: int, device: torch.device) -> Tensor:
        """Returns one flat tensor that ``(numel,)`` numbers can be encoded into."""

    @abstractmethod
    def encode(self, row: Tensor, encoded: Tensor, numel: int, part: slice) -> None:
        """Encodes a part of the ``(numel,)`` numbers, given in fp32; it begins at a multiple of ``BLOCK``.

        Raises:
            ConfigError: a number is too large for the code.
        """

    @abstractmethod
    def decode(self, encoded: Tensor, numel: int, part: slice, out: Tensor) -> None:
        """Writes a part of the ``(numel,)`` numbers to ``out``, of their count."""

    @abstractmethod
    def nbytes(self, numel: int) -> int:
        """Returns the bytes of so many numbers, encoded."""


class Floats(Code):
    """Rounded to a narrower floating dtype, or not at all.

    Args:
        dtype: float32, bfloat16 or float16.
    """

    plain = True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def room(self, numel: int, device: torch.device) -> Tensor:
        """Returns an empty tensor of the narrower dtype."""
        return torch.empty(numel, dtype=self.dtype, device=device)

    def encode(self, row: Tensor, encoded: Tensor, numel: int, part: slice) -> None:
        """Rounds a row's numbers to the narrower dtype."""
        own = encoded[part].copy_(row)
        if self.dtype == torch.float16 and bool(own.isinf().any()):
            raise ConfigError(
                "storage: a delta is too large for float16",
                expected="at most 65504",
                got=float(row.abs().max()),
                todo="use bfloat16",
            )

    def decode(self, encoded: Tensor, numel: int, part: slice, out: Tensor) -> None:
        """Widens encoded numbers to the dtype of ``out``."""
        out.copy_(encoded[part])

    def nbytes(self, numel: int) -> int:
        """Returns the bytes of so many numbers of the narrower dtype."""
        return numel * self.dtype.itemsize


class Blockwise(Code):
    """Signed integers of 8 or 4 bits times a scale per block of 64: ``scale = max |x| / L``, with L = 127 or 7.

    Rounding to the nearest costs at most half a step, ``max |x| / (2 L)`` of the block: 1/254 or 1/14 of its largest.

    Args:
        bits: 8 or 4.
    """

    def __init__(self, bits: int) -> None:
        self.bits, self.largest = bits, 2 ** (bits - 1) - 1

    def room(self, numel: int, device: torch.device) -> Tensor:
        """Returns bytes for scales, then integers; two of 4 bits share a byte, one from each half of the block."""
        return torch.empty(self.nbytes(numel), dtype=torch.uint8, device=device)

    def encode(self, row: Tensor, encoded: Tensor, numel: int, part: slice) -> None:
        """Writes the scale of each block, and the integers."""
        blocks = torch.nn.functional.pad(row, (0, -len(row) % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(dim=1) / self.largest
        steps = (blocks / torch.where(scales > 0, scales, 1.0).unsqueeze(1)).round().clamp(-self.largest, self.largest)
        whole = steps.to(torch.int8)
        if self.bits == 4:
            low, high = whole.chunk(2, dim=1)
            whole = (low & 15) | (high << 4)
        own_scales, own = self._parts(encoded, numel, part)
        own_scales.copy_(scales)
        own.copy_(whole)

    def decode(self, encoded: Tensor, numel: int, part: slice, out: Tensor) -> None:
        """Writes the integers times their scales, in fp32."""
        scales, whole = self._parts(encoded, numel, part)
        fits = len(out) == len(whole) * BLOCK
        values = (out if fits else out.new_empty(len(whole) * BLOCK)).view(-1, BLOCK)
        if self.bits == 8:
            torch.mul(whole, scales.unsqueeze(1), out=values)
        else:
            low, high = values.chunk(2, dim=1)
            torch.mul(whole << 4, scales.unsqueeze(1) / 16, out=low)
            torch.mul(whole >> 4, scales.unsqueeze(1), out=high)  # this shift repeats the sign
        if not fits:
            out.copy_(values.view(-1)[part.start % BLOCK :][: len(out)])

    def _parts(self, encoded: Tensor, numel: int, part: slice) -> tuple[Tensor, Tensor]:
        """Returns scales and integers of the blocks that a part lies in."""
        count, blocks = -(-numel // BLOCK), slice(part.start // BLOCK, -(-part.stop // BLOCK))
        whole = encoded[4 * count :].view(torch.int8).view(count, BLOCK * self.bits // 8)
        return encoded[: 4 * count].view(torch.float32)[blocks], whole[blocks]

    def nbytes(self, numel: int) -> int:
        """Returns the bytes of all blocks, the last of them filled up."""
        return -(-numel // BLOCK) * (4 + BLOCK * self.bits // 8)


class EncodedDeltas(Deltas):
    """Deltas that are stored in a code, one tensor for each expert.

    With one coefficient for the whole tensor, merge and contraction of T experts take (3T + 1) P operations on floats,
    (4T + 1) P on 8 bits and (6T + 1) P on 4.

    Args:
        encoded: what each expert's delta is encoded to.
        code: of the numbers.
        shape: of the tensor.
        device: where sums are computed.
        carry: brings one after the other to the device; each may change when the next one is asked for.
    """

    divisible = True

    def __init__(
        self,
        encoded: Sequence[Tensor],
        code: Code,
        shape: torch.Size,
        device: torch.device,
        carry: Callable[[Iterable[Tensor]], Iterator[Tensor]] = iter,
    ) -> None:
        self.encoded, self.code, self.carry = tuple(encoded), code, carry
        self.shape, self.device = shape, device

    @classmethod
    def of(
        cls,
        deltas: Deltas,
        code: Code,
        put: Callable[[Tensor], Tensor],
        carry: Callable[[Iterable[Tensor]], Iterator[Tensor]] = iter,
    ) -> EncodedDeltas:
        """Returns the deltas of one tensor, read and encoded by a code.

        Args:
            deltas: as they are read.
            code: of the numbers.
            put: gives an encoded tensor's copy in its place.
            carry: from there to the deltas' device.
        """
        numel, encoded = deltas.shape.numel(), []
        for piece, opened in deltas.in_pieces(size=-(-PIECE // BLOCK) * BLOCK):
            rows = (row for batch in opened.row_batches(torch.float32, piece) for row in batch)
            for expert, row in enumerate(rows):
                if piece.start == 0:
                    encoded.append(code.room(numel, row.device))
                code.encode(row, encoded[expert], numel, piece)
                if piece.stop == numel:  # of one piece, as on a device, one expert's is there at a time
                    encoded[expert] = put(encoded[expert])
        return cls(encoded, code, deltas.shape, deltas.device, carry)

    def row_batches(self, dtype: torch.dtype, part: slice | None = None) -> Iterator[Tensor]:
        """Yields one expert's row at a time, as stored: whoever adds widens inside the operation; few bits are decoded."""
        if not self.code.plain:
            yield from self.widened(dtype, part)
            return
        part = self.whole if part is None else part
        for one in self.carry(self.encoded):
            yield one[part].unsqueeze(0)

    def widened(self, dtype: torch.dtype, part: slice | None = None) -> Iterator[Tensor]:
        """Yields a few experts' rows at a time, whose products with a gradient take less than one after the other."""
        part = self.whole if part is None else part
        few = made_at_once(len(self.encoded), self.device)
        if few == 1 and self.code.plain:
            return super().widened(dtype, part)
        return filled(
            self.carry(self.encoded),
            room([few, part.stop - part.start], dtype, self.device),
            lambda one, row: self.code.decode(one, self.shape.numel(), part, row),
        )

    def dense(self) -> Tensor:
        """Returns the decoded deltas of all experts: ``(experts, *shape)`` in fp32."""
        rows = torch.empty(len(self.encoded), self.shape.numel(), dtype=torch.float32, device=self.device)
        for row, one in zip(rows, self.carry(self.encoded), strict=True):
            self.code.decode(one, self.shape.numel(), self.whole, row)
        return rows.view(len(rows), *self.shape)
