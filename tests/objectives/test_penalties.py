"""Penalties: the distance to the initial coefficients, as a number and as a gradient."""

import pytest
import torch

from adamerge.errors import ConfigError
from adamerge.objectives.penalties import CoefficientNorm, DistanceToInitial, SummedDistanceToInitial
from adamerge.parametrizations import ChunkWise, LayerWise, TaskWise
from adamerge.parametrizations.constraints import Sigmoid, Softmax
from adamerge.task_vectors.task_vectors import TaskVectors


@pytest.fixture
def vectors():
    return TaskVectors({"a": torch.zeros(4)}, {"one": {"a": torch.ones(4)}, "two": {"a": 2 * torch.ones(4)}})


@pytest.fixture
def layers():
    base = {name: torch.zeros(4) for name in "abc"}
    return TaskVectors(base, {task: {n: v + 1 + i for n, v in base.items()} for i, task in enumerate(["one", "two"])})


def test_it_is_the_papers_mean_over_experts_and_layers(layers):
    """R = 1 / (K L) sum_k sum_l |alpha_kl - abar|, K = 2 and L = 3, with abar = 0.1: (0.4 + 0.1 + 0.2 + 0.3) / 6."""
    parametrization = LayerWise(layers, init=0.1)
    values = {"a": [[0.5], [0.1]], "b": [[0.0], [0.3]], "c": [[0.1], [-0.2]]}
    parametrization.load_values({name: torch.tensor(value) for name, value in values.items()})
    assert float(DistanceToInitial(5.0)(parametrization).detach()) == pytest.approx(5 * 1.0 / 6, rel=1e-6)


def test_the_released_code_is_as_many_times_larger_as_there_are_experts(layers):
    parametrization = LayerWise(layers, init=0.1)
    parametrization.values()["b"][0, 0] = 0.7
    papers, released = (kind(5.0)(parametrization) for kind in (DistanceToInitial, SummedDistanceToInitial))
    assert float(papers.detach()) == pytest.approx(5 * 0.6 / 6) and float(released.detach()) == pytest.approx(
        5 * 0.6 / 3
    )


def test_chunks_of_a_layer_are_added_up(layers):
    """K = 2, L = 3, two chunks each: eleven of the twelve at the prior, one off by 0.6 gives 0.6 / 6."""
    parametrization = ChunkWise(layers, init=0.3, chunks=2)
    values = parametrization.values()
    values["b"][1, 1] = 0.9
    assert float(DistanceToInitial()(parametrization).detach()) == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize(("power", "expected"), [(1.0, (0.2 + 0.5) / 2), (2.0, (0.04 + 0.25) / 2)])
def test_it_is_the_weighted_mean_distance(vectors, power, expected):
    parametrization = TaskWise(vectors, init=0.3)
    parametrization.load_values({"model": torch.tensor([[0.5], [-0.2]])})
    penalty = DistanceToInitial(weight=3.0, power=power)(parametrization)
    assert float(penalty.detach()) == pytest.approx(3 * expected, rel=1e-6)
    penalty.backward()
    slopes = [0.5, -0.5] if power == 1 else [0.2, -0.5]
    assert parametrization.w.grad.flatten().tolist() == pytest.approx([3 * s for s in slopes], rel=1e-5)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_it_is_zero_with_a_finite_gradient_at_the_start(vectors, power):
    parametrization = TaskWise(vectors, init=0.25)
    penalty = DistanceToInitial(power=power)(parametrization)
    assert float(penalty.detach()) == 0.0
    penalty.backward()
    assert parametrization.w.grad.tolist() == [[0.0], [0.0]]


def test_it_counts_every_coefficient_alike_and_after_the_constraint(vectors):
    """One group of two experts with two chunks each: their sum over 2 * 1."""
    parametrization = ChunkWise(vectors, init=0.5, constraint=Sigmoid(), chunks=2)
    parametrization.load_values({"a": torch.tensor([[0.0, 1.0], [0.0, 0.0]])})
    expected = (1 / (1 + torch.exp(torch.tensor(-1.0, dtype=torch.float64))) - 0.5) / 2
    assert float(DistanceToInitial()(parametrization).detach()) == pytest.approx(float(expected), rel=1e-6)


def test_it_is_zero_at_the_start_under_softmax_too(vectors):
    penalty = DistanceToInitial()(TaskWise(vectors, init=None, constraint=Softmax()))
    assert float(penalty.detach()) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize(("weight", "power"), [(-1.0, 1.0), (1.0, 0.5)])
def test_numbers_out_of_range_are_refused(weight, power):
    with pytest.raises(ConfigError, match="DistanceToInitial"):
        DistanceToInitial(weight, power)


@pytest.mark.parametrize(("order", "expected"), [(1.0, (7.0 + 2.0) / 2), (2.0, (5.0 + 2.0) / 2)])
def test_the_norm_is_over_experts_and_its_mean_over_their_coefficients(vectors, order, expected):
    """Columns (3, -4) and (0, 2): L1 7 and 2, L2 5 and 2."""
    parametrization = ChunkWise(vectors, init=0.0, chunks=2)
    parametrization.load_values({"a": torch.tensor([[3.0, 0.0], [-4.0, 2.0]])})
    penalty = CoefficientNorm(weight=0.5, order=order)(parametrization)
    assert float(penalty.detach()) == pytest.approx(0.5 * expected, rel=1e-6)
    penalty.backward()
    slopes = [1.0, 0.0, -1.0, 1.0] if order == 1 else [0.6, 0.0, -0.8, 1.0]
    assert parametrization.w.grad.flatten().tolist() == pytest.approx([0.25 * slope for slope in slopes], rel=1e-6)


@pytest.mark.parametrize("order", [1.0, 1.5, 2.0, 3.0])
def test_the_norm_has_a_finite_gradient_at_the_base(vectors, order):
    parametrization = TaskWise(vectors, init=0.0)
    CoefficientNorm(order=order)(parametrization).backward()
    assert parametrization.w.grad.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize(("weight", "order"), [(-1.0, 1.0), (1.0, 0.5)])
def test_a_norm_out_of_range_is_refused(weight, order):
    with pytest.raises(ConfigError, match="CoefficientNorm"):
        CoefficientNorm(weight, order)
