"""WUDI's own iteration: some steps of Adam on the paper's loss, from the sum of the task vectors."""

import math

import pytest
import torch
from torch import Tensor
from toy_matrices import dense, factors_of, low_rank_of, taus

from adamerge.errors import ConfigError
from adamerge.solvers import WudiDescent
from adamerge.solvers.matrices import Whole


def loss(d: Tensor, experts: Tensor) -> Tensor:
    """The paper's, term by term."""
    return sum(((d - tau) @ tau.T).pow(2).sum() / tau.pow(2).sum() for tau in experts)


def by_hand(experts: Tensor, lr: float, steps: int) -> Tensor:
    """Adam as its paper has it, on autograd's gradient, in float64."""
    d, mean, square = experts.sum(dim=0), 0.0, 0.0
    for step in range(1, steps + 1):
        d = d.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(d, experts), d)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        d = d - lr * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return d.detach()


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (1, 4)])
def test_steps_are_adams_on_the_papers_loss(shape):
    experts = taus(*shape).double()
    got = WudiDescent(lr=1e-3, steps=20).merged([Whole(tau) for tau in experts])
    expected = by_hand(experts, 1e-3, 20)
    assert (got - expected).abs().max() < 1e-10
    assert (got - experts.sum(dim=0)).abs().max() > 1e-3, "it went somewhere"


def test_the_loss_falls():
    experts = taus(6, 8)
    values = [float(loss(WudiDescent(1e-3, steps).solve("w", {"w": dense(experts)}), experts)) for steps in (0, 5, 50)]
    assert values == sorted(values, reverse=True) and values[2] < 0.9 * values[0]


def test_without_a_step_it_is_the_sum():
    experts = taus(6, 8)
    total = experts[0] + experts[1] + experts[2]
    assert torch.equal(WudiDescent(steps=0).solve("w", {"w": dense(experts)}), total)


def test_factors_go_the_way_of_their_products():
    low, plain = low_rank_of(factors_of((6, 7), (1, 2)), (6, 7))
    got, expected = WudiDescent(1e-3, 10).solve("w", {"w": low}), WudiDescent(1e-3, 10).solve("w", {"w": dense(plain)})
    # Adam divides by the gradient's size: each step is at most lr, and two roundings of one gradient part by less
    assert (got - expected).abs().max() < 1e-4


@pytest.mark.parametrize(("lr", "steps"), [(0.0, 3), (-1.0, 3), (math.nan, 3), (1e-3, -1)])
def test_numbers_in_range(lr, steps):
    with pytest.raises(ConfigError, match="WudiDescent: lr must be"):
        WudiDescent(lr, steps)
