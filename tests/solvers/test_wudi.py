"""WUDI in closed form: at its solution the gradient of the paper's loss with the ridge is zero."""

import math

import pytest
import torch
from rounding import UNIT, gamma
from torch import Tensor
from toy_matrices import dense, factors_of, low_rank_of, taus

from adamerge.errors import ConfigError
from adamerge.solvers import Wudi
from adamerge.solvers.matrices import Whole
from adamerge.solvers.wudi import interference

SHAPES = [(6, 9), (9, 6), (4, 4), (3, 1), (1, 5)]


def loss(d: Tensor, experts: Tensor, ridge: float) -> Tensor:
    """The paper's loss, and the ridge in units of the mean square of an input direction, term by term in float64."""
    norms = [(tau**2).sum() for tau in experts]
    total = sum(((d - tau) @ tau.T).pow(2).sum() / norm for tau, norm in zip(experts, norms, strict=True) if norm > 0)
    # c = mean(diag A): the trace of A is sum_k ||tau_k||^2 / ||tau_k||^2
    c = sum(norm > 0 for norm in norms) / experts.shape[2]
    return total + ridge * c * (d - experts.sum(dim=0)).pow(2).sum()


def gradient(d: Tensor, experts: Tensor, ridge: float) -> Tensor:
    d = d.double().requires_grad_()
    (found,) = torch.autograd.grad(loss(d, experts.double(), ridge), d)
    return found


def allowed(d: Tensor, sizes: Tensor, ridge: float, extra: int = 0) -> Tensor:
    """How far the gradient may be from zero: what roundings of the products in fp32 and of the solution make of it.

    ``d A - B + ridge c (d - S)`` with A off by the roundings of sums over rows, B by those over rows and columns, S by those
    over experts, and d itself by one.
    """
    d, sizes = d.double().abs(), sizes.double().abs()
    weights = [1 / (one**2).sum() for one in sizes]
    a = sum(w * one.T @ one for w, one in zip(weights, sizes, strict=True))
    b = sum(w * one @ one.T @ one for w, one in zip(weights, sizes, strict=True))
    pull, rows, columns = ridge * len(sizes) / sizes.shape[2], *sizes.shape[1:]
    roundings = gamma(rows + columns + extra)
    error = d @ a * (roundings + UNIT) + b * roundings
    error += pull * (d * (UNIT + roundings) + sizes.sum(dim=0) * (gamma(len(sizes) + extra) + roundings))
    return 2 * error


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ridge", [1e-2, 1.0, 10.0])
def test_the_gradient_of_the_loss_is_zero_at_the_solution(shape, ridge):
    experts = taus(*shape, experts=4)
    d = Wudi(ridge).solve("w", {"w": dense(experts)})
    assert d.dtype == torch.float32 and d.shape == shape
    assert (gradient(d, experts, ridge).abs() <= allowed(d, experts, ridge)).all()
    # and a step away it is not: the bound can be passed
    off = d + 1e-4 * d.abs().max() * torch.ones_like(d)
    assert (gradient(off, experts, ridge).abs() > allowed(off, experts, ridge)).any()


def test_factors_give_what_their_products_give():
    low, plain = low_rank_of(factors_of((8, 6), (2, 3, 1)), (8, 6))
    d = Wudi(0.5).solve("w", {"w": low})
    left, right = low.read()
    sizes = torch.stack([(left.abs() * row.abs()) @ right.abs() for row in low.weights])
    scale = (sizes**2).sum(dim=(1, 2)) / (plain**2).sum(dim=(1, 2))  # factors may cancel
    bound = allowed(d, sizes, 0.5, extra=8) * scale.max()
    assert (gradient(d, plain, 0.5).abs() <= bound).all()


def test_one_number_by_hand():
    """1 x 1: A = 2, B = 1 + 3, c = 2: D (2 + 2) = 4 + 2 * 4."""
    experts = torch.tensor([[[1.0]], [[3.0]]])
    assert Wudi(1.0).solve("w", {"w": dense(experts)}).item() == 3.0


def test_the_ridge_leads_from_the_experts_to_their_sum():
    experts = taus(5, 7)
    total = experts.double().sum(dim=0)
    near = Wudi(1e6).solve("w", {"w": dense(experts)})
    assert (near - total).abs().max() < 1e-4 * total.abs().max()
    far = [float((Wudi(ridge).solve("w", {"w": dense(experts)}) - total).norm()) for ridge in (0.01, 0.1, 1.0, 10.0)]
    assert far == sorted(far, reverse=True)


def test_one_expert_is_its_own_solution():
    experts = taus(5, 7, experts=1)
    assert (Wudi(1.0).solve("w", {"w": dense(experts)}) - experts[0]).abs().max() <= gamma(40) * experts.abs().max() * 8


def test_experts_of_disjoint_inputs_do_not_interfere():
    """Each changes other columns: whatever the ridge, the sum does what each of them does."""
    experts = torch.zeros(2, 4, 6)
    experts[0, :, :3], experts[1, :, 3:] = taus(4, 3, experts=1)[0], taus(4, 3, experts=1, seed=1)[0]
    d = Wudi(0.1).solve("w", {"w": dense(experts)})
    assert (d - experts.sum(dim=0)).abs().max() < 1e-5 * experts.abs().max()


def test_an_expert_that_changed_nothing_has_no_say():
    experts = taus(4, 5)
    more = torch.cat([experts, torch.zeros(1, 4, 5)])
    assert torch.equal(Wudi().solve("w", {"w": dense(more)}), Wudi().solve("w", {"w": dense(experts)}))
    assert torch.equal(Wudi().solve("w", {"w": dense(torch.zeros(3, 4, 5))}), torch.zeros(4, 5))


def test_the_units_of_the_task_vectors_do_not_matter():
    """Powers of two are exact, and so is what is made of them."""
    experts = taus(4, 5)
    assert torch.equal(Wudi().solve("w", {"w": dense(8 * experts)}), 8 * Wudi().solve("w", {"w": dense(experts)}))


def test_the_system_is_in_float64():
    a, b = interference([Whole(one) for one in taus(4, 5)])
    assert a.dtype == b.dtype == torch.float64 and a.shape == (5, 5) and b.shape == (4, 5)
    assert a.diagonal().sum().item() == pytest.approx(3, rel=1e-6), "one for each expert"


@pytest.mark.parametrize("ridge", [0.0, -1.0, math.nan, math.inf])
def test_the_ridge_is_positive(ridge):
    with pytest.raises(ConfigError, match="Wudi: ridge must be"):
        Wudi(ridge)
