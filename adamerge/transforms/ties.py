"""TIES: trim each task vector to its largest entries, elect a sign per element, keep what agrees with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from adamerge.deltas.base import Deltas
from adamerge.errors import ConfigError
from adamerge.transforms.base import Elementwise, State

LOW_BITS = 16


class Ties(Elementwise):
    """Trim, elect and keep, with a disjoint sum: the task vectors of AdaMerging++.

    1. Trim: entry e of expert k survives when ``|tau_k[e]|`` is at least the ``(d - floor(keep * d))``-th smallest
       magnitude of the whole vector; ``d`` counts every tensor the task vectors hold.
    2. Elect: ``s[e] = sign(sum_k trimmed_k[e])``; where that is 0, the sign of the sum of all elected signs.
    3. Keep ``trimmed_k[e]`` where its sign is ``s[e]``, else 0. No mean, no rescaling: ``DisjointMean`` after it is TIES
       as published.

    The paper's formula has no step for a sum of 0, nor have ours and the released code's any effect on one expert alone.
    Where the elected signs cancel as well, nothing of such an element is kept; the released code of both papers keeps its
    negative entries, since it asks only whether the sign is positive. Two experts that are each other's negative give it.

    The threshold is exact and streamed: two histograms over the bits of ``|tau|``, whose order is that of the numbers.

    Args:
        keep: fraction of entries kept in each task vector, in (0, 1].

    Raises:
        ConfigError: ``keep`` is not in (0, 1].

    Reference: TIES (Yadav et al., 2023), https://arxiv.org/abs/2306.01708; the sum instead of the mean is that of
    AdaMerging++ (Yang et al., 2024), https://arxiv.org/abs/2310.02575.
    """

    local = True

    def __init__(self, keep: float = 0.2) -> None:
        if not 0 < keep <= 1:
            raise ConfigError(f"Ties: keep must be in (0, 1], got {keep}", todo="keep: 0.2 is the papers' value")
        self.keep = keep

    def prepare(self, vectors: Mapping[str, Deltas]) -> State:
        """Returns the thresholds of trimming, one per expert, and the majority sign."""
        numel = sum(deltas.shape.numel() for deltas in vectors.values())
        rank = numel - int(self.keep * numel)
        thresholds = _kth_smallest_magnitudes(vectors, max(rank, 1))
        majority = 0.0
        for deltas in _pieces(vectors):
            majority += float(_elected(_trimmed(deltas, thresholds)).sum(dtype=torch.float64))
        return {"thresholds": thresholds.tolist(), "majority": [float(torch.tensor(majority).sign())]}

    def check_state(self, state: State, experts: int) -> None:
        """Checks whether a state has one threshold per expert, and one sign."""
        wanted = {"thresholds": experts, "majority": 1}
        if {key: len(values) for key, values in state.items()} != wanted or not all(
            isinstance(value, float) for values in state.values() for value in values
        ):
            raise ConfigError(f"Ties: not a state of {experts} thresholds and one majority sign: {state}")

    def apply(self, name: str, deltas: Tensor, state: State) -> Tensor:
        """Returns the entries that survive trimming and agree with the elected sign, and 0 elsewhere."""
        # made where it costs nothing: a tensor made on a device makes the host wait for it
        trimmed = _trimmed(deltas, torch.tensor(state["thresholds"]).to(deltas.device, non_blocking=True))
        elected = _elected(trimmed)
        elected = torch.where(elected == 0, state["majority"][0], elected)
        return trimmed.mul_(trimmed.sign() == elected)


class DisjointMean(Elementwise):
    """Divides each entry by the number of experts whose entry is not 0: what they sum to is the mean of those that are left.

    After ``Ties``, it is the disjoint merge of the TIES paper, ``tau = 1 / |A| * sum over A of trimmed_k`` with the experts
    A of the elected sign, once one coefficient ``lambda`` is given to all.

    Reference: TIES (Yadav et al., 2023), https://arxiv.org/abs/2306.01708, algorithm 1.
    """

    local = True

    def apply(self, name: str, deltas: Tensor, state: State) -> Tensor:
        """Returns the entries, divided by the number of experts whose entry there is not 0."""
        return deltas / deltas.ne(0).sum(dim=0).clamp_min(1)


def _pieces(vectors: Mapping[str, Deltas]) -> Iterator[Tensor]:
    """Yields all tensors of all experts, ``(experts, n)`` at a time."""
    for deltas in vectors.values():
        for piece, opened in deltas.in_pieces():
            yield opened.rows(torch.float32, piece)


def _trimmed(deltas: Tensor, thresholds: Tensor) -> Tensor:
    return deltas * (deltas.abs() >= thresholds.unsqueeze(1))


def _elected(trimmed: Tensor) -> Tensor:
    # in float64, where the order of the experts cannot decide a sign
    return trimmed.sum(dim=0, dtype=torch.float64).sign().to(trimmed.dtype)


def _kth_smallest_magnitudes(vectors: Mapping[str, Deltas], rank: int) -> Tensor:
    """Returns the ``rank``-th smallest (from 1) of each expert's magnitudes over all tensors: (experts,) in fp32."""
    high, below = _bins_at(vectors, torch.tensor(rank), None)
    low, _ = _bins_at(vectors, rank - below, high)
    return ((high << LOW_BITS) | low).to(torch.int32).view(torch.float32)


def _bins_at(vectors: Mapping[str, Deltas], rank: Tensor, high: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns for each expert the histogram bin that holds ``rank``, and how many entries lie in the bins before it.

    Bins are the upper half of the magnitudes' bits, or the lower half of those whose upper half is ``high``.
    """
    counts: list[Tensor] = []
    for deltas in _pieces(vectors):
        bits = deltas.abs().cpu().view(torch.int32)
        if not counts:
            counts = [torch.zeros(1 << LOW_BITS, dtype=torch.int64) for _ in bits]
        for expert, row in enumerate(bits):
            upper = row >> LOW_BITS
            bins = upper if high is None else row[upper == high[expert]] & ((1 << LOW_BITS) - 1)
            counts[expert] += torch.bincount(bins, minlength=1 << LOW_BITS)
    cumulative = torch.stack(counts).cumsum(dim=1)
    bins_found = torch.searchsorted(cumulative, rank.expand(len(counts)).reshape(-1, 1).contiguous()).squeeze(1)
    before = torch.where(bins_found > 0, cumulative.gather(1, (bins_found - 1).clamp_min(0).unsqueeze(1)).squeeze(1), 0)
    return bins_found, before
