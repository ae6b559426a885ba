"""TSV-Merge: from the definition of the singular components, in float64 with numpy; and planted answers."""

import math

import numpy
import pytest
import torch
from rounding import gamma
from toy_matrices import dense, factors_of, low_rank_of, taus

from adamerge.errors import ConfigError
from adamerge.solvers import TSVM
from adamerge.solvers.matrices import Product, Whole


def whitened(columns):
    """``X (X^T X)^(-1/2)``, the paper's orthogonal Procrustes solution, by the eigenvectors of the Gram matrix."""
    values, vectors = numpy.linalg.eigh(columns.T @ columns)
    return columns @ (vectors / numpy.sqrt(values)) @ vectors.T


def by_definition(experts, alpha):
    """Eigenvectors of ``tau^T tau`` are the right singular vectors; the first 1/T of them of each task."""
    us, ss, vs = [], [], []
    for tau in experts:
        squares, right = numpy.linalg.eigh(tau.T @ tau)
        first = numpy.argsort(squares)[::-1][: min(tau.shape) // len(experts)]
        vs.append(right[:, first])
        ss.append(numpy.sqrt(squares[first]))
        us.append(tau @ right[:, first] / ss[-1])
    u, v = whitened(numpy.concatenate(us, 1)), whitened(numpy.concatenate(vs, 1))
    return alpha * (u * numpy.concatenate(ss)) @ v.T


@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (6, 6), (3, 8)])
def test_it_is_the_papers(shape):
    experts = taus(*shape).double()
    got = TSVM(alpha=0.7).merged([Whole(tau) for tau in experts])
    expected = by_definition(experts.numpy(), 0.7)
    assert numpy.abs(got.numpy() - expected).max() < 1e-10 * numpy.abs(expected).max() * 1e2


def test_factors_give_what_their_products_give():
    generator = torch.Generator().manual_seed(0)
    thin = [
        Product(torch.randn(9, 2, generator=generator).double(), torch.randn(2, 8, generator=generator).double())
        for _ in range(4)
    ]
    got, expected = TSVM().merged(thin), TSVM().merged([Whole(one.dense()) for one in thin])
    assert (got - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_experts_that_do_not_meet_are_added(alpha):
    """Rank one each, on other rows and columns: whitening has nothing to do."""
    experts = torch.zeros(2, 4, 6)
    experts[0, :2, :3], experts[1, 2:, 3:] = (torch.outer(*(torch.randn(n) for n in (2, 3))) for _ in range(2))
    got = TSVM(alpha).solve("w", {"w": dense(experts)})
    # an SVD, two whitenings and two products, each of sums of at most six
    assert (got - alpha * experts.sum(dim=0)).abs().max() <= gamma(5 * 6 * 6) * 4 * experts.abs().max()


def test_one_expert_comes_back():
    experts = taus(5, 6, experts=1)
    assert (TSVM().solve("w", {"w": dense(experts)}) - experts[0]).abs().max() <= gamma(
        5 * 6 * 6
    ) * 4 * experts.abs().max()


def test_a_component_of_no_weight_turns_no_other():
    """An expert of rank one has a second component of rounding alone, which whitening would give the same say."""
    one, other = torch.zeros(6, 6).double(), torch.zeros(6, 6).double()
    one[0, 0], other[1, 1], other[2, 2], other[3, 3] = 2.0, 3.0, 2.0, 1.0
    got = TSVM().merged([Whole(one), Whole(other)])
    assert (got - one - other).abs().max() < 1e-12


def test_more_experts_than_components_keep_one_each():
    experts = taus(2, 3, experts=5)
    assert TSVM().solve("w", {"w": dense(experts)}).shape == (2, 3)
    assert torch.equal(TSVM().solve("w", {"w": dense(torch.zeros(3, 2, 3))}), torch.zeros(2, 3))


def test_factors_of_rank_zero():
    low, plain = low_rank_of(factors_of((6, 5), (0, 2)), (6, 5))
    assert (
        TSVM().solve("w", {"w": low}) - TSVM().solve("w", {"w": dense(plain)})
    ).abs().max() < 1e-5 * plain.abs().max()


def test_alpha_is_finite():
    with pytest.raises(ConfigError, match="TSVM: alpha"):
        TSVM(math.inf)
