"""Constraints: each is its formula, inverts what it can, and keeps or loses the gradient as it says."""

import math

import pytest
import torch

from adamerge.errors import ConfigError
from adamerge.parametrizations.constraints import Clamp, Free, Projection, Sigmoid, Softmax

W = torch.tensor([[-1.0, 0.25, 3.0], [0.5, 1.0, 0.0]])


def test_each_is_its_formula():
    assert torch.equal(Free()(W), W) and torch.equal(Projection()(W), W)
    assert Clamp()(W).tolist() == [[0.0, 0.25, 1.0], [0.5, 1.0, 0.0]]
    assert Clamp(-0.5, 0.75)(W).tolist() == [[-0.5, 0.25, 0.75], [0.5, 0.75, 0.0]]
    exact = W.double()
    assert torch.allclose(Sigmoid()(W).double(), 1 / (1 + (-exact).exp()), atol=1e-7)
    shares = Softmax()(W)
    assert torch.allclose(shares.double(), exact.exp() / exact.exp().sum(0), atol=1e-7)
    assert torch.allclose(shares.sum(dim=0), torch.ones(3))


@pytest.mark.parametrize(
    "constraint",
    [Free(), Clamp(), Projection(), Sigmoid(), Clamp(-2, 2)],
    ids=["free", "clamp", "projection", "sigmoid", "wide"],
)
@pytest.mark.parametrize("coefficient", [0.1, 0.3, 0.5, 0.999])
def test_raw_is_the_inverse(constraint, coefficient):
    w = torch.tensor([[constraint.raw(coefficient)]], dtype=torch.float64)
    assert float(constraint(w)) == pytest.approx(coefficient, abs=1e-12)


@pytest.mark.parametrize("coefficient", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize("kind", [Clamp, Projection, Sigmoid])
def test_a_coefficient_that_cannot_be_is_an_error(kind, coefficient):
    with pytest.raises(ConfigError, match=f"{kind.__name__}: the initial coefficient"):
        kind().raw(coefficient)


@pytest.mark.parametrize("bound", [0.0, 1.0])
def test_bounds_belong_to_intervals_and_not_to_the_sigmoid(bound):
    assert Clamp().raw(bound) == Projection().raw(bound) == bound
    with pytest.raises(ConfigError):
        Sigmoid().raw(bound)


@pytest.mark.parametrize("kind", [Clamp, Projection])
@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)])
def test_empty_intervals_are_refused(kind, low, high):
    with pytest.raises(ConfigError, match=f"{kind.__name__}: low must be below high"):
        kind(low, high)


def test_clamp_loses_the_gradient_past_a_bound_and_projection_keeps_it():
    w = torch.tensor([[-0.5, 0.5, 1.5]], requires_grad=True)
    assert torch.autograd.grad(Clamp()(w).sum(), w)[0].tolist() == [[0.0, 1.0, 0.0]]
    assert torch.autograd.grad(Projection()(w).sum(), w)[0].tolist() == [[1.0, 1.0, 1.0]]


def test_only_projection_moves_w_after_a_step():
    for constraint in (Free(), Clamp(), Sigmoid(), Softmax()):
        w = W.clone()
        constraint.project_(w)
        assert torch.equal(w, W)
    w = W.clone()
    Projection(0.0, 0.5).project_(w)
    assert w.tolist() == [[0.0, 0.25, 0.5], [0.5, 0.5, 0.0]]
