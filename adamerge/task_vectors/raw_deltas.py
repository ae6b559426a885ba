"""Raw deltas: of one tensor, before any transform, of each expert as it has them: factors, deltas, or whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.deltas.base import Deltas
from adamerge.deltas.low_rank import JoinedDeltas, LowRankDeltas
from adamerge.deltas.streamed import StoredDeltas, StreamedDeltas


def raw_deltas(
    name: str, base: Callable[[], Tensor], experts: Iterable[Checkpoint], shape: torch.Size, device: torch.device
) -> Deltas:
    """Returns what experts changed in a tensor; nothing is read yet.

    Args:
        name: of the tensor, on disk.
        base: reads the base's tensor.
        experts: in their order.
        shape: of the tensor.
        device: where deltas are summed.
    """

    def of_one_kind(run: list[Checkpoint]) -> Deltas:
        factors = [own for one in run if (own := one.factors(name)) is not None]
        if factors:
            return LowRankDeltas.of(factors, shape, device)
        readers = [read for one in run if (read := one.delta(name)) is not None]
        if readers:
            return StoredDeltas(readers, shape, device)
        return StreamedDeltas(base, [partial(one.__getitem__, name) for one in run], shape, device)

    runs = groupby(experts, lambda one: (one.factors(name) is None, one.delta(name) is None))
    kinds = [(len(run), of_one_kind(run)) for run in [list(own) for _, own in runs]]
    return kinds[0][1] if len(kinds) == 1 else JoinedDeltas(kinds)
