"""The linear family: who shares a coefficient with whom."""

import math

import pytest
import torch

from adamerge.errors import ConfigError
from adamerge.parametrizations import BlockWise, ChunkWise, LayerWise, RandomPartition, TaskWise
from adamerge.parametrizations.constraints import Clamp, Projection, Sigmoid, Softmax
from adamerge.task_vectors.task_vectors import TaskVectors

NAMES = {
    "visual.conv1.weight": (4, 3), "visual.class_embedding": (5,), "logit_scale": (),
    "visual.transformer.resblocks.3.mlp.c_fc.weight": (2, 2), "visual.transformer.resblocks.3.ln_1.bias": (2,),
    "visual.transformer.resblocks.11.ln_1.bias": (2,), "model.layers.0.sub.7.weight": (3,), "0.weight": (2,),
    "empty": (0, 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def vectors():
    base = {name: torch.zeros(shape) for name, shape in NAMES.items()}
    experts = {task: {n: v + k for n, v in base.items()} for k, task in enumerate(("one", "two"), start=1)}
    return TaskVectors(base, experts)


def test_groups_by_name(vectors):
    assert list(TaskWise(vectors).coefficients()) == ["model"]
    assert sorted(LayerWise(vectors).coefficients()) == sorted(NAMES)
    assert sorted(ChunkWise(vectors).coefficients()) == sorted(NAMES)
    assert sorted(BlockWise(vectors).coefficients()) == [
        "0", "empty", "logit_scale", "model.layers.0", "visual", "visual.transformer.resblocks.11",
        "visual.transformer.resblocks.3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("visual.transformer.resblocks.3.mlp.c_fc.weight", "visual.transformer.resblocks.3"),
        ("model.layers.10.self_attn.2.q", "model.layers.10"),
        ("visual.conv1.weight", "visual"),
        ("layers.2", "layers.2"),
        ("layers.2x.weight", "layers"),
        ("positional_embedding", "positional_embedding"),
    ],
)
def test_blocks_end_at_the_first_integer(vectors, name, group):
    assert BlockWise(vectors).group(name) == group


def test_sizes(vectors):
    assert TaskWise(vectors).w.shape == (2, 1)
    assert LayerWise(vectors).w.shape == (2, len(NAMES))
    assert BlockWise(vectors).w.shape == (2, 7)
    counts = {group: value.shape for group, value in ChunkWise(vectors, chunks=3).coefficients().items()}
    assert counts["visual.conv1.weight"] == (2, 3) and counts["logit_scale"] == (2, 1)
    assert counts["0.weight"] == (2, 2) and counts["empty"] == (2, 1)


def test_changing_one_coefficient_changes_the_tensors_of_its_group_and_no_other(vectors):
    for kind in (TaskWise, BlockWise, LayerWise, ChunkWise):
        parametrization = kind(vectors)
        before = {name: parametrization(name, vectors[name]).detach() for name in vectors}
        start = parametrization.w.detach().clone()
        for group in parametrization.values():
            with torch.no_grad():
                parametrization.values()[group][1, 0] += 1.0
                after = {name: parametrization(name, vectors[name]) for name in vectors}
                parametrization.w.copy_(start)
            moved = {name for name in vectors if not torch.equal(before[name], after[name])}
            assert moved == {name for name in vectors if parametrization.group(name) == group and name != "empty"}


def test_chunks_are_contiguous_runs_of_the_flattened_tensor(vectors):
    parametrization = ChunkWise(vectors, init=0.0, chunks=5)
    parametrization.load_values(
        {g: torch.stack([torch.arange(v.shape[1]) + 1.0] * 2) for g, v in parametrization.values().items()}
    )
    # 12 elements in 5 chunks: edges at 0 2 4 7 9 12; the deltas are 1 and 2, so an element is 3 times its coefficient
    expected = [1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 5]
    update = parametrization("visual.conv1.weight", vectors["visual.conv1.weight"])
    assert update.flatten().tolist() == [3.0 * c for c in expected]


def test_init(vectors):
    assert TaskWise(vectors).w.unique().tolist() == pytest.approx([0.3])
    assert TaskWise(vectors, init=None).w.unique().tolist() == [0.5] and TaskWise(vectors, init=None).initial == 0.5
    raw = TaskWise(vectors, init=0.1, constraint=Sigmoid()).w.detach().unique().double()
    assert float(raw) == pytest.approx(float(torch.logit(torch.tensor(0.1, dtype=torch.float64))), rel=1e-6)
    with pytest.raises(ConfigError, match="Clamp: the initial coefficient 2.0"):
        LayerWise(vectors, init=2.0, constraint=Clamp())
    with pytest.raises(ConfigError, match="ChunkWise: chunks must be at least 1"):
        ChunkWise(vectors, chunks=0)


def test_projection_reaches_the_parameters_and_the_optimiser_keeps_hold_of_them(vectors):
    parametrization = LayerWise(vectors, constraint=Projection())
    optimizer = torch.optim.SGD(parametrization.parameters(), lr=1.0)
    before = parametrization.w.data_ptr()
    parametrization.w.grad = torch.full_like(parametrization.w, 5.0)
    optimizer.step()
    assert parametrization.w.min() < -4
    parametrization.project_()
    assert torch.equal(parametrization.w, torch.zeros_like(parametrization.w))
    assert parametrization.w.data_ptr() == before and parametrization.w.requires_grad


def test_nothing_but_w_is_saved_and_it_is_fp32(vectors):
    torch.set_default_dtype(torch.float64)
    try:
        parametrization = ChunkWise(vectors)
    finally:
        torch.set_default_dtype(torch.float32)
    assert list(parametrization.state_dict()) == ["w"] and parametrization.w.dtype == torch.float32


@pytest.mark.parametrize("kind", [TaskWise, BlockWise, LayerWise, ChunkWise, RandomPartition])
def test_a_softmax_starts_at_equal_shares_or_says_that_it_cannot(vectors, kind):
    """Of two experts each starts at a half: 0.3 cannot be, and is no longer passed over in silence."""
    with pytest.raises(ConfigError, match=r"Softmax: 2 experts start at 0\.5 each, and init is 0\.3") as raised:
        kind(vectors, 0.3, Softmax())
    assert "init=null" in raised.value.todo
    for init in (None, 0.5, 0.4995):
        made = kind(vectors, init, Softmax())
        assert made.initial == 0.5 and all((value == 0.5).all() for value in made.coefficients().values())


@pytest.mark.parametrize("init", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("constraint", [None, Sigmoid(), Softmax()])
def test_an_initial_coefficient_that_is_no_number_is_refused(vectors, init, constraint):
    with pytest.raises(ConfigError, match="LayerWise: init must be a finite number"):
        LayerWise(vectors, init, constraint)
