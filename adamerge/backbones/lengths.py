"""Lengths: how much of a batch's named inputs each sample fills, known on the host; what is behind is padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adamerge.backbones.inputs import COUNT, Inputs

Lengths = dict[str, Tensor]
"""By name of an input, how many entries each sample has of it: int64 ``(samples,)``, on the CPU."""


def lengths_of(samples: Sequence[Inputs]) -> Lengths | None:
    """Returns how long samples are; None where all are of one shape, so that nothing of their batch is padding.

    ``pieces`` are left out, because a network runs them ``packed``, without padding.

    Args:
        samples: preprocessed, each without the sample dimension.
    """
    first = samples[0]
    if isinstance(first, Tensor):
        return None
    named = [sample for sample in samples if isinstance(sample, dict)]
    return varied({name: torch.tensor([len(sample[name]) for sample in named]) for name in padded(first, 1)})


def varied(lengths: Lengths) -> Lengths | None:
    """Returns lengths, or None where they are the same in all samples."""
    return lengths if any(bool((each != each[0]).any()) for each in lengths.values()) else None


def padded(inputs: Inputs, dimensions: int) -> list[str]:
    """Returns the names of the inputs of which a batch has padding, where its samples are of several lengths.

    Args:
        inputs: of a sample or of a batch.
        dimensions: that such an input has at least: 1 of a sample, 2 of a batch.
    """
    if isinstance(inputs, Tensor):
        return []
    return [name for name, value in inputs.items() if value.ndim >= dimensions and f"{name}{COUNT}" not in inputs]


def shortened(inputs: Inputs, lengths: Lengths | None) -> Inputs:
    """Returns a batch without the positions that are padding in each of its samples, as if it were stacked of these alone.

    Args:
        inputs: of a batch.
        lengths: of its samples; nothing is known to be padding when None.
    """
    if lengths is None or isinstance(inputs, Tensor):
        return inputs
    return {name: value[:, : int(lengths[name].max())] if name in lengths else value for name, value in inputs.items()}


def positions_of(lengths: Lengths) -> Tensor:
    """Returns the positions that samples have in each part of a network, int64 ``(parts, samples)``.

    Inputs whose lengths are the same in all samples, such as token ids and which of them are attended to, are of the same
    part; an encoder-decoder network has two.
    """
    return torch.stack(list(lengths.values())).unique(dim=0)


def longest_first(positions: Tensor) -> Tensor:
    """Returns the samples' places from the longest to the shortest, int64 ``(samples,)``; of equals, in their order.

    Args:
        positions: of samples, ``(parts, samples)``; a sample is as long as all of its together.
    """
    return positions.sum(dim=0).argsort(descending=True, stable=True)
