"""What rounding allows: bounds that follow from how many roundings a number has gone through, on whatever processor.

A sum of n numbers in fp32, in any order and with or without fused products, is off by at most n units of rounding of the sum
of their sizes (Higham, Accuracy and Stability of Numerical Algorithms, 2002, lemma 3.1 and section 4.2), and where roundings
go up and down alike by 6 sqrt(n) but once in 30 million times (Higham and Mary, 2019, theorem 2.4: 2 exp(-6^2 / 2)).
Which order a kernel takes depends on the instruction set, the number of threads and the shape: nothing closer can be asked
for of two processors, or of two batches of other sizes on one.

A chain of sums, such as a network and its gradient, gives in fp32 what it would give without rounding for weights that are
a little off, each by the roundings of its own layer's sum (section 3.5). ``allowed`` evaluates a reference in float64 for
such weights, and so turns the number of roundings into a bound on the result without guessing at its condition.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

UNIT = 2.0**-24
"""The most that rounding to fp32 changes a number, as a share of it."""

Disturb = Callable[[Tensor], Tensor]


def gamma(roundings: int) -> float:
    """The most that so many roundings in a row change a number, as a share of it."""
    return min(roundings, 6 * roundings**0.5) * UNIT


def undisturbed(value: Tensor) -> Tensor:
    """The weights as they are."""
    return value


def allowed(reference: Callable[[Disturb], Tensor], roundings: int, draws: int = 12) -> tuple[Tensor, float]:
    """A reference in float64, and how far fp32 may be from it: ``allowed_each`` of one result."""
    return allowed_each(lambda disturb: {"": reference(disturb)}, roundings, draws)[""]


def allowed_each(
    reference: Callable[[Disturb], Mapping[str, Tensor]], roundings: int, draws: int = 12
) -> dict[str, tuple[Tensor, float]]:
    """Results in float64, and how far fp32 may be from each.

    A rounding is as likely anywhere within a unit, so n of them deviate by ``sqrt(n / 3)`` units, as the weights do here.

    Args:
        reference: of weights that it hands through its argument.
        roundings: of the longest sum of a layer, with the merge that made its weight, there and back.
        draws: of the disturbances.

    Returns:
        By name the exact result; and six standard deviations of its element that moves most, with the result's own rounding.
    """
    exact = reference(undisturbed)
    squares = {name: torch.zeros_like(value) for name, value in exact.items()}
    for draw in range(draws):
        generator = torch.Generator().manual_seed(draw)

        def disturb(value: Tensor, generator: torch.Generator = generator) -> Tensor:
            noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
            return value * (1 + (roundings / 3) ** 0.5 * UNIT * noise)

        for name, value in reference(disturb).items():
            squares[name] += (value - exact[name]).square()
    return {
        name: (value, 6 * float((squares[name] / draws).max().sqrt()) + UNIT * float(value.abs().max()))
        for name, value in exact.items()
    }


def roundings_of(network: nn.Module, positions: int = 1, samples: int = 1) -> int:
    """Roundings on the longest path through a network and back to a weight's gradient.

    Its layers follow one another: a product with a matrix sums over its inputs on the way forward and over its outputs on
    the way back, a normalisation twice over its width each way, attention over the positions; a weight's gradient sums
    over positions and samples.

    Args:
        network: whose layers are counted.
        positions: of a sample: patches, or tokens.
        samples: whose gradients are added.
    """
    total = positions * samples
    for name, weight in network.named_parameters():
        if weight.dim() > 1:
            total += weight.shape[0] + weight[0].numel() + 2 * positions
        else:
            total += 4 * weight.numel() if name.endswith("weight") else 2
    return total
