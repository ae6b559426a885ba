"""splitmix64: random numbers without a generator, as a hash of a key and a number, the same on every machine.

Coefficient files depend on these bits: a partition's ids and a mask's noise are computed again wherever a file is opened.

Reference: Fast Splittable Pseudorandom Number Generators (Steele et al., 2014), https://doi.org/10.1145/2660193.2660195.
"""

from __future__ import annotations

import hashlib

import numpy
from numpy.typing import NDArray
from torch import Tensor

GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""What counters are multiplied by, and the two factors of the mix."""


def start_of(key: str) -> int:
    """Returns 64 bits of ``sha256(key)``, as an unsigned number: where the counter of a key begins."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")


def signed(bits: int) -> int:
    """Returns the int64 that has these 64 bits: torch has no uint64 arithmetic, and int64 products wrap around alike."""
    return bits - (1 << 64) if bits >> 63 else bits


def mix_(values: NDArray[numpy.uint64]) -> None:
    """Mixes 64-bit numbers on the host, in place."""
    values ^= values >> numpy.uint64(30)
    values *= numpy.uint64(FIRST)
    values ^= values >> numpy.uint64(27)
    values *= numpy.uint64(SECOND)
    values ^= values >> numpy.uint64(31)


def mixed(values: Tensor) -> Tensor:
    """Returns int64 numbers mixed, on their device: the bits that ``mix_`` gives."""
    values = (values ^ _shifted(values, 30)) * signed(FIRST)
    values = (values ^ _shifted(values, 27)) * signed(SECOND)
    return values ^ _shifted(values, 31)


def mix_with_signs_(values: Tensor) -> Tensor:
    """Mixes int64 numbers in place, on their device, by shifts that repeat the sign and without the last one.

    Other bits than those of ``mix_``, in fewer operations and no memory, for numbers of which the upper bits count.
    """
    values.bitwise_xor_(values >> 30).mul_(signed(FIRST))
    return values.bitwise_xor_(values >> 27).mul_(signed(SECOND))


def _shifted(values: Tensor, places: int) -> Tensor:
    """Returns numbers shifted to the right by ``places`` bits, filled with zeros."""
    return (values >> places) & ((1 << (64 - places)) - 1)
