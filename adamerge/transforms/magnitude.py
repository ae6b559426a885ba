"""Magnitude pruning: each matrix of each task vector keeps its largest entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adamerge.deltas.base import Deltas
from adamerge.errors import ConfigError
from adamerge.transforms.base import Elementwise, State


class Magnitude(Elementwise):
    """Keeps ``floor(keep * n)`` of the ``n`` entries of each matrix of each expert, fewer where magnitudes are equal.

    An entry is kept when its magnitude exceeds the ``(n - floor(keep * n))``-th smallest. Tensors that are no matrix stay.

    Args:
        keep: fraction of entries kept in each matrix, in (0, 1].

    Raises:
        ConfigError: ``keep`` is not in (0, 1].

    Reference: FusionBench (Tang et al., 2024), https://arxiv.org/abs/2406.03280, whose AdaMerging can prune so.
    """

    def __init__(self, keep: float = 0.2) -> None:
        if not 0 < keep <= 1:
            raise ConfigError(f"Magnitude: keep must be in (0, 1], got {keep}")
        self.keep = keep

    def deltas(self, name: str, deltas: Deltas, state: State, experts: Sequence[str]) -> Deltas:
        """Returns pruned deltas of matrices; of other tensors the deltas as they are, low-rank factors included."""
        return super().deltas(name, deltas, state, experts) if len(deltas.shape) == 2 else deltas

    def apply(self, name: str, deltas: Tensor, state: State) -> Tensor:
        """Returns the largest entries of each expert's matrix, and 0 elsewhere: ``(experts, numel)`` in fp32."""
        pruned = deltas.shape[1] - int(self.keep * deltas.shape[1])
        if pruned == 0:
            return deltas
        magnitudes = deltas.abs()
        thresholds = torch.kthvalue(magnitudes, pruned, dim=1, keepdim=True).values
        return deltas * (magnitudes > thresholds)
