"""Products of factors: the formula, with the same bits for any number of threads, and the slopes of each component."""

from __future__ import annotations

import pytest
import torch
from rounding import gamma

from adamerge.deltas import factor_products
from adamerge.deltas.factor_products import product, slopes


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def drawn(rows, count, columns, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, count), (count, columns), (count,))
    return (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)


SHAPES = [(5, 3, 4), (7, 300, 6), (1, 9, 4), (6, 9, 1), (1, 200, 1), (4, 0, 3), (1, 0, 3), (33, 128, 17), (2, 129, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_it_is_the_product(shape, scaled):
    left, right, scale = drawn(*shape)
    factor = scale if scaled else torch.ones_like(scale)
    found = product(left, right, factor)
    wanted = (left.double() * factor.double()) @ right.double()
    size = (left.abs().double() * factor.abs().double()) @ right.abs().double()
    assert found.shape == wanted.shape and found.dtype == torch.float32
    assert ((found.double() - wanted).abs() <= gamma(shape[1] + 2) * size).all()


# of sizes at which a product with two threads has other bits on one processor or another: (300, 192, 1), (64, 777, 333)
@pytest.mark.parametrize(
    "shape", [(300, 192, 1), (1, 512, 192), (64, 777, 333), (100, 777, 48), (48, 512, 256), (300, 777, 5), (3, 1536, 2)]
)
def test_threads_are_in_no_bit(shape, threads):
    left, right, scale = drawn(*shape)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(product(left, right, scale))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("shape", [(5, 3, 4), (7, 300, 6), (1, 9, 4), (4, 0, 3)], ids=str)
def test_slopes_are_those_of_each_component(shape, monkeypatch):
    left, right, _ = drawn(*shape)
    gradient = torch.randn(shape[0], shape[2])
    wanted = torch.einsum("in,ij,nj->n", left.double(), gradient.double(), right.double())
    size = torch.einsum("in,ij,nj->n", left.double().abs(), gradient.double().abs(), right.double().abs())
    whole = slopes(left, gradient, right)
    assert ((whole.double() - wanted).abs() <= gamma(shape[0] + shape[2] + 1) * size).all()
    monkeypatch.setattr(factor_products, "STORED_PIECE", 1)  # then TERMS at a time
    assert ((slopes(left, gradient, right).double() - wanted).abs() <= gamma(shape[0] + shape[2] + 1) * size).all()
