"""Raw deltas: those of experts of one kind together, and kinds in the order of the experts."""

import torch
from toy_matrices import factors_of

from adamerge.checkpoints.checkpoint import StateDict
from adamerge.deltas.low_rank import JoinedDeltas, LowRankDeltas
from adamerge.deltas.streamed import StoredDeltas, StreamedDeltas
from adamerge.task_vectors.raw_deltas import raw_deltas

SHAPE, CPU = torch.Size((4, 3)), torch.device("cpu")
BASE = torch.arange(12.0).view(SHAPE)
LOW, STORED = factors_of(SHAPE, (2,))[0], torch.full(SHAPE, 0.25)


class Factored(StateDict):
    def factors(self, name):
        return LOW


class Stored(StateDict):
    def delta(self, name):
        return lambda: STORED


def deltas_of(*kinds):
    experts = [kind({"w": BASE + 2}) for kind in kinds]
    return raw_deltas("w", lambda: BASE, experts, SHAPE, CPU)


def test_experts_of_one_kind_are_one():
    for kind, deltas in ((Factored, LowRankDeltas), (Stored, StoredDeltas), (StateDict, StreamedDeltas)):
        made = deltas_of(kind, kind)
        assert type(made) is deltas and len(made.dense()) == 2 and made.shape == SHAPE


def test_kinds_keep_the_order_of_the_experts():
    made = deltas_of(StateDict, Stored, Stored, Factored, StateDict)
    assert isinstance(made, JoinedDeltas) and [count for count, _ in made.kinds] == [1, 2, 1, 1]
    wanted = [torch.full(SHAPE, 2.0), STORED, STORED, LOW.dense(), torch.full(SHAPE, 2.0)]
    assert all(torch.allclose(row, own) for row, own in zip(made.dense(), wanted, strict=True))
