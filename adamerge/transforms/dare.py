"""DARE: drop most entries of each task vector at random, and scale up those that are left."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from adamerge.deltas.base import Deltas, TransformedDeltas
from adamerge.deltas.splitmix64 import GAMMA, mix_with_signs_, signed, start_of
from adamerge.deltas.tuning import HASHED_NOISE
from adamerge.errors import ConfigError
from adamerge.transforms.base import State, Transform


class Dare(Transform):
    """``tau_k[e] -> b_k[e] tau_k[e] / (1 - drop)``, where ``b_k[e]`` is 0 with probability ``drop`` and else 1.

    Whether an entry is dropped is a hash of (seed, expert, tensor name, flat index), and no generator is asked: the same
    entries on every device, from every storage, whatever the order of the experts and the pieces that a tensor is read in.
    Each read costs twelve operations on integers an entry; stored in memory, task vectors are read once.

    Args:
        drop: probability that an entry is dropped, in [0, 1).
        seed: of the draws.
        rescale: divide what is left by ``1 - drop``, so that the mean over draws is the task vector itself.

    Raises:
        ConfigError: ``drop`` is not in [0, 1), or ``seed`` is no integer.

    Reference: DARE (Yu et al., 2024), https://arxiv.org/abs/2311.03099.
    """

    def __init__(self, drop: float = 0.9, seed: int = 0, rescale: bool = True) -> None:
        if not 0 <= drop < 1:
            raise ConfigError(f"Dare: drop must be in [0, 1), got {drop}", todo="drop: 0.9 is the paper's value")
        if type(seed) is not int:
            raise ConfigError(f"Dare: seed must be an integer, got {seed!r}")
        self.drop, self.seed, self.rescale = drop, seed, rescale

    def deltas(self, name: str, deltas: Deltas, state: State, experts: Sequence[str]) -> Deltas:
        """Returns deltas whose entries are dropped at each read."""
        starts = [signed(start_of(repr((self.seed, expert, name)))) for expert in experts]
        return TransformedDeltas(deltas, partial(self._thinned, starts), local=True)

    def _thinned(self, starts: Sequence[int], rows: Tensor, part: slice) -> Tensor:
        """Drops entries in place: ``rows`` are the experts' flat elements ``part``, and each hash begins at its start."""
        below = int(self.drop * 2**64) - 2**63  # a share of drop of all int64 numbers
        for start, row in zip(starts, rows, strict=True):
            for first in range(0, len(row), HASHED_NOISE):
                entries = row[first : first + HASHED_NOISE]
                index = part.start + first
                bits = torch.arange(index, index + len(entries), device=rows.device)
                mix_with_signs_(bits.mul_(signed(GAMMA)).add_(start))
                entries.masked_fill_(bits < below, 0.0)
        return rows.mul_(1 / (1 - self.drop)) if self.rescale else rows
