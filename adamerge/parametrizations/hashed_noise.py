"""Noise without a generator: a hash of (seed, draw, tensor name, flat index), the same on every device and process."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

STEP = 1 << 22
"""Elements hashed at a time, so that the integers take little memory beside a tensor of the model."""


def logistic(key: tuple[object, ...], numel: int, device: torch.device) -> Tensor:
    """``log u - log(1 - u)`` of independent ``u`` from the middles of 2^23 equal parts of (0, 1): never 0, never 1.

    The integers are the same everywhere; the logarithm differs by the rounding of a device. Costs 7.5 operations an
    element: one hash of 64 bits gives two of them.

    Args:
        key: anything printable, such as (seed, draw, tensor name).
        numel: how many.
        device: where.

    Returns:
        ``(numel,)``, fp32.

    Reference: the mix is that of splitmix64, Fast Splittable Pseudorandom Number Generators (Steele et al., 2014),
    https://doi.org/10.1145/2660193.2660195.
    """
    start = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little", signed=True)
    noise = torch.empty(numel, dtype=torch.float32, device=device)
    for first in range(0, numel, STEP):
        part = noise[first : first + STEP]
        z = torch.arange(first // 2, first // 2 + (len(part) + 1) // 2, device=device)
        # int64 products wrap around and shifts carry the sign, on every device alike
        z.mul_(-7046029254386353131).add_(start)
        z.bitwise_xor_(z >> 30).mul_(-4658895280553007687)
        z.bitwise_xor_(z >> 27).mul_(-7723592293110705685)
        halves = z.view(torch.int32)
        halves[::2].bitwise_xor_(halves[1::2])  # the lower half of a product is mixed less well than the upper
        bits = halves[: len(part)].bitwise_right_shift_(9)
        torch.add(bits, (1 << 22) + 0.5, out=part)
        part.mul_(2.0**-23).logit_()
    return noise
