"""Noise without a generator: a hash of (seed, draw, tensor name, flat index), the same on every device and process."""

from __future__ import annotations

import torch
from torch import Tensor

from adamerge.deltas.splitmix64 import GAMMA, mix_with_signs_, signed, start_of
from adamerge.deltas.tuning import HASHED_NOISE


def logistic(key: tuple[object, ...], numel: int, device: torch.device) -> Tensor:
    """Returns ``log u - log(1 - u)`` of independent ``u`` from the middles of 2^23 equal parts of (0, 1): never 0, never 1.

    The integers are the same everywhere; the logarithm differs by the rounding of a device. Costs 7.5 operations an
    element: one hash of 64 bits gives two of them.

    Args:
        key: anything printable, such as (seed, draw, tensor name).
        numel: how many.
        device: where.

    Returns:
        ``(numel,)``, fp32.
    """
    start = signed(start_of(repr(key)))
    noise = torch.empty(numel, dtype=torch.float32, device=device)
    for first in range(0, numel, HASHED_NOISE):
        part = noise[first : first + HASHED_NOISE]
        z = torch.arange(first // 2, first // 2 + (len(part) + 1) // 2, device=device)
        mix_with_signs_(z.mul_(signed(GAMMA)).add_(start))
        halves = z.view(torch.int32)
        halves[::2].bitwise_xor_(halves[1::2])  # the lower half of a product is mixed less well than the upper
        bits = halves[: len(part)].bitwise_right_shift_(9)
        torch.add(bits, (1 << 22) + 0.5, out=part)
        part.mul_(2.0**-23).logit_()
    return noise
