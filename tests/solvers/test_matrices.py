"""Matrices: products and decompositions of factors are those of what they multiply to, in float64."""

import pytest
import torch
from toy_matrices import factors_of, low_rank_of

from adamerge.deltas.base import DenseDeltas
from adamerge.deltas.low_rank import JoinedDeltas
from adamerge.solvers.matrices import Product, Whole, matrices, orthogonal, summed

SHAPES = [(5, 7), (7, 5), (4, 4), (1, 6), (6, 1)]


def pair(rows, columns, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    return Product(left, right), Whole(left @ right)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [0, 1], ids=["product", "whole"])
def test_products_are_those_of_the_matrix(shape, kind):
    matrix = pair(*shape)[kind]
    tau = pair(*shape)[1].values
    for got, expected in (
        (matrix.dense(), tau),
        (matrix.square_norm(), (tau**2).sum()),
        (matrix.gram(), tau.T @ tau),
        (matrix.cubed(), tau @ tau.T @ tau),
    ):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [0, 1], ids=["product", "whole"])
def test_a_decomposition_has_no_more_components_than_the_matrix_has_rank(shape, kind):
    matrix, tau = pair(*shape)[kind], pair(*shape)[1].values
    u, s, vt = matrix.decomposed()
    assert len(s) == min(2, *shape)
    assert ((u * s) @ vt - tau).abs().max() <= 1e-12 * tau.abs().max()
    identity = torch.eye(len(s), dtype=torch.float64)
    assert (u.T @ u - identity).abs().max() < 1e-12 and (vt @ vt.T - identity).abs().max() < 1e-12
    assert (s.diff() <= 0).all() and (s > 0).all()
    assert (s - torch.linalg.svdvals(tau)[: len(s)]).abs().max() <= 1e-12 * s[0]


@pytest.mark.parametrize("kind", [0, 1], ids=["product", "whole"])
def test_what_is_outside_of_a_span(kind):
    basis, _ = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64))
    matrix, tau = pair(5, 7)[kind], pair(5, 7)[1].values
    rest = matrix.outside(basis).dense()
    assert (basis.T @ rest).abs().max() < 1e-12
    assert (rest + basis @ basis.T @ tau - tau).abs().max() < 1e-12
    inside = Whole(basis @ torch.randn(2, 7, dtype=torch.float64))
    assert len(inside.outside(basis).decomposed(of=inside.square_norm().sqrt())[1]) == 0, "what is left is rounding"


def test_a_matrix_of_zeros_has_no_component():
    u, s, vt = Whole(torch.zeros(3, 4)).decomposed()
    assert (u.shape, s.shape, vt.shape) == ((3, 0), (0,), (0, 4))
    assert orthogonal(u).shape == (3, 0)


def test_sums_stay_thin_while_they_are():
    (one, whole), (other, second) = pair(6, 5, 2, 1), pair(6, 5, 2, 2)
    thin = summed([one, other])
    assert isinstance(thin, Product) and thin.left.shape == (6, 4)
    for total in (thin, summed([whole, other]), summed([one, second])):
        assert (total.dense() - whole.values - second.values).abs().max() < 1e-12
    thick = summed([one, other, other])
    assert isinstance(thick, Whole), "six columns of factors, and the rank is five at most"
    assert (thick.values - whole.values - 2 * second.values).abs().max() < 1e-12
    before = whole.values.clone()
    summed([whole, second])
    assert torch.equal(whole.values, before), "a sum leaves its terms alone"


def test_each_expert_of_a_pool_is_a_matrix_in_order():
    factors = factors_of((3, 2, 4), ranks=(2, 0, 1))
    low, dense = low_rank_of(factors, (3, 2, 4))
    plain = torch.randn(2, 3, 2, 4)
    found = list(matrices(JoinedDeltas([(2, DenseDeltas(plain)), (3, low)])))
    assert [type(one) for one in found] == [Whole, Whole, Product, Product, Product]
    expected = torch.cat([plain, dense]).view(5, 3, 8)
    for one, value in zip(found, expected, strict=True):
        assert (one.dense() - value).abs().max() < 1e-6


def test_the_nearest_orthonormal_columns():
    x = torch.randn(6, 3, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(x.T @ x)
    expected = x @ (vectors / values.sqrt()) @ vectors.T  # X (X^T X)^(-1/2)
    assert (orthogonal(x) - expected).abs().max() < 1e-12
    assert (orthogonal(x.T) - expected.T).abs().max() < 1e-12
    twice = orthogonal(torch.cat([x, x], dim=1))  # two columns that share one direction share its length
    assert (twice - torch.cat([expected, expected], dim=1) / 2**0.5).abs().max() < 1e-12
