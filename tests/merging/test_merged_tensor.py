"""Merged tensors: the formula in fp32 with one rounding, and updates in parts that are the whole one bit for bit."""

from __future__ import annotations

import pytest
import torch

from adamerge.merging.merged_tensor import merged_tensor, updates
from adamerge.parametrizations import BlockWise, ChunkWise, LayerWise, RandomPartition, TaskWise
from adamerge.task_vectors.task_vectors import TaskVectors

SHAPES = {"matrix": (4, 3), "vector": (7,), "scalar": (), "empty": (0, 2)}


def task_vectors():
    base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    torch.manual_seed(0)
    return TaskVectors(base, {task: {n: torch.randn(v.shape) for n, v in base.items()} for task in ("one", "two")})


def test_merged_tensor_is_one_fp32_sum_then_one_cast():
    base, update = torch.tensor([1.0, 256.0], dtype=torch.bfloat16), torch.tensor([2.0**-8 + 2.0**-20, 1.5])
    expected = (base.double() + update.double()).to(torch.bfloat16)
    assert torch.equal(merged_tensor(base, update, torch.bfloat16), expected)
    assert expected.tolist() != (base + update.to(torch.bfloat16)).tolist()  # what a sum in bfloat16 would have given


@pytest.mark.parametrize("kind", [TaskWise, BlockWise, LayerWise, ChunkWise, RandomPartition])
def test_pieces_are_the_update_bit_for_bit(cut, kind):
    cut(5)
    vectors = task_vectors()
    parametrization = kind(vectors)
    parametrization.load_values({group: torch.rand(value.shape) for group, value in parametrization.values().items()})
    for name in vectors:
        pieces = [part for _, part in updates(parametrization, name, vectors[name])]
        update = parametrization(name, vectors[name])
        assert len(pieces) == max(1, -(-update.numel() // 5)) and not any(piece.requires_grad for piece in pieces)
        assert torch.equal(torch.cat([torch.empty(0), *pieces]).view(update.shape), update)


class Normalised(LayerWise):
    """An update that depends on the whole tensor."""

    def forward(self, name, deltas):
        update = super().forward(name, deltas)
        return update / update.norm()


def test_who_changes_the_formula_is_not_cut_into_pieces_of_the_old_one(cut):
    cut(2)
    vectors, name = task_vectors(), "matrix"
    ((_, piece),) = updates(Normalised(vectors), name, vectors[name])
    assert piece.norm().item() == pytest.approx(1)
    assert torch.equal(piece, Normalised(vectors)(name, vectors[name]).flatten())
