"""Importance-guided chunks: the allocation by hand, every chunk used, unimportant tensors at the prior."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from adamerge.errors import ConfigError
from adamerge.objectives.penalties import DistanceToInitial
from adamerge.parametrizations import ImportanceChunkWise, LayerWise
from adamerge.parametrizations.constraints import Sigmoid, Softmax
from adamerge.parametrizations.importance import allocate
from adamerge.task_vectors.task_vectors import TaskVectors

SHAPES = {"a": (5, 7), "b": (9,), "c": (2, 2), "d": ()}
LARGE = dict.fromkeys("abcd", 100)


@pytest.fixture(scope="module")
def vectors():
    torch.manual_seed(0)
    base = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    return TaskVectors(base, {task: {n: v + torch.randn(v.shape) for n, v in base.items()} for task in ("one", "two")})


@pytest.mark.parametrize(
    ("importance", "budget", "kappa", "expected"),
    [
        # B = 4: shares 4 * (.5, .25, .125, .125)
        ([0.5, 0.25, 0.125, 0.125], 1.0, 1.0, [2, 1, 0, 0]),
        ([0.5, 0.25, 0.125, 0.125], 2.0, 1.0, [4, 2, 1, 1]),
        # squares 16, 4, 1, 1 of 22: 4 * (.727, .182, .045, .045)
        ([4.0, 2.0, 1.0, 1.0], 1.0, 2.0, [2, 0, 0, 0]),
        # roots 3, 2, 1, 0 of 6: 4 * (.5, .333, .167, 0)
        ([9.0, 4.0, 1.0, 0.0], 1.0, 0.5, [2, 1, 0, 0]),
        ([0.9, 0.1, 0.0, 0.0], 1.0, 0.0, [1, 1, 1, 1]),
        ([1e-300, 1e-300, 0.0, 0.0], 1.0, 2.0, [2, 2, 0, 0]),
    ],
)
def test_the_allocation_by_hand(importance, budget, kappa, expected):
    found = allocate(dict(zip("abcd", importance, strict=True)), budget, kappa, LARGE)
    assert list(found.values()) == expected


@settings(max_examples=100, deadline=None)
@given(
    some.lists(some.floats(0, 1e3), min_size=1, max_size=12).filter(lambda found: max(found) > 1e-3),
    some.floats(0.1, 5),
    some.floats(0, 4),
)
def test_the_budget_is_never_overspent_and_order_is_that_of_importance(importance, budget, kappa):
    names = {str(i): value for i, value in enumerate(importance)}
    found = allocate(names, budget, kappa, dict.fromkeys(names, 10**6))
    assert sum(found.values()) <= budget * len(names) + 1e-6
    for one in names:
        for other in names:
            assert names[one] < names[other] or found[one] >= found[other]
    scaled = allocate({name: 2 * value for name, value in names.items()}, budget, kappa, dict.fromkeys(names, 10**6))
    assert scaled == found


def test_a_tensor_has_at_most_as_many_chunks_as_elements(vectors):
    found = ImportanceChunkWise(vectors, importance=dict.fromkeys(SHAPES, 1.0), budget=20.0)
    assert found.allocation == {"a": 20, "b": 9, "c": 4, "d": 1}


@pytest.mark.parametrize("constraint", [None, Sigmoid(), Softmax()], ids=["free", "sigmoid", "softmax"])
def test_tensors_without_chunks_stay_at_the_prior_and_are_not_learned(vectors, constraint):
    prior = 0.5 if isinstance(constraint, Softmax) else 0.2
    parametrization = ImportanceChunkWise(vectors, prior, constraint, allocation={"a": 4, "b": 0, "c": 1, "d": 0})
    assert parametrization.w.shape == (2, 5)
    assert {n: v.shape for n, v in parametrization.values().items()} == {"a": (2, 4), "c": (2, 1)}
    assert parametrization.coefficients().keys() == {"a", "c"}
    with torch.no_grad():
        parametrization.w.normal_()
    for name in ("b", "d"):
        update = parametrization(name, vectors[name])
        assert not update.requires_grad
        assert torch.allclose(update, prior * vectors[name].dense().sum(dim=0), atol=1e-6)
    assert parametrization("a", vectors["a"]).requires_grad


def test_every_chunk_is_used_also_where_they_are_uneven(vectors):
    """9 elements in 4 chunks: pieces of ceil(9 / 4) would leave the last coefficient without any."""
    parametrization = ImportanceChunkWise(vectors, allocation={"a": 1, "b": 4, "c": 3, "d": 1})
    for name in ("b", "c"):
        gradient = torch.autograd.grad(parametrization(name, vectors[name]).pow(2).sum(), parametrization.w)[0]
        columns = parametrization._columns[name]
        assert gradient[:, columns].abs().min() > 0


def test_one_chunk_each_is_layer_wise(vectors):
    chunked, plain = ImportanceChunkWise(vectors, allocation=dict.fromkeys(SHAPES, 1)), LayerWise(vectors)
    for name in vectors:
        assert torch.equal(chunked(name, vectors[name]), plain(name, vectors[name]))


def test_the_penalty_sees_what_is_learned_alone(vectors):
    parametrization = ImportanceChunkWise(vectors, 0.3, allocation={"a": 2, "b": 0, "c": 0, "d": 0})
    with torch.no_grad():
        parametrization.w.copy_(torch.tensor([[0.3, 0.5], [0.3, 0.3]]))
    # two experts, one group that is learned; the three frozen ones would make it a quarter
    assert DistanceToInitial(1.0)(parametrization).item() == pytest.approx(0.2 / 2)


def test_importances_are_read_from_a_file_and_become_plain_data(vectors, tmp_path):
    given = {"a": 0.5, "b": 0.25, "c": 0.125, "d": 0.125, "elsewhere": 7.0}
    (tmp_path / "importance.json").write_text(json.dumps(given))
    found = ImportanceChunkWise(vectors, importance=str(tmp_path / "importance.json"))
    assert found.importance == given and found.allocation == {"a": 2, "b": 1, "c": 0, "d": 0}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "importance is missing"),
        ({"importance": {"a": 1.0}}, "no importance of 'b'"),
        ({"importance": dict.fromkeys(SHAPES, math.nan)}, "finite"),
        ({"importance": dict.fromkeys(SHAPES, -1.0)}, "not negative"),
        ({"importance": dict.fromkeys(SHAPES, 1.0), "budget": 0.0}, "budget must be"),
        ({"importance": dict.fromkeys(SHAPES, 1.0), "kappa": -1.0}, "kappa"),
        ({"importance": dict.fromkeys(SHAPES, 1.0), "budget": 0.9}, "no tensor has a coefficient"),
        ({"importance": dict.fromkeys(SHAPES, 0.0)}, "no tensor has a coefficient"),
        ({"allocation": {"a": 1}}, "not that of the merged tensors"),
        ({"allocation": {"a": 1, "b": 1, "c": 5, "d": 1}}, "'c' cannot have 5 chunks"),
        ({"allocation": {"a": True, "b": 1, "c": 1, "d": 1}}, "'a' cannot have True chunks"),
    ],
)
def test_what_cannot_be_allocated_is_refused(vectors, arguments, says):
    with pytest.raises(ConfigError, match=says):
        ImportanceChunkWise(vectors, **arguments)
