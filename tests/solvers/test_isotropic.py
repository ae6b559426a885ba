"""Iso-C and Iso-CTS: from the definitions, in float64 with numpy; and planted answers."""

import math

import numpy
import pytest
import torch
from rounding import gamma
from toy_matrices import dense, taus

from adamerge.errors import ConfigError
from adamerge.solvers import IsoC, IsoCTS
from adamerge.solvers.matrices import Product, Whole


def polar(x):
    """``X (X^T X)^(-1/2)`` for tall matrices of full rank, and its transpose's transpose for wide ones."""
    if x.shape[0] < x.shape[1]:
        return polar(x.T).T
    values, vectors = numpy.linalg.eigh(x.T @ x)
    return x @ (vectors / numpy.sqrt(values)) @ vectors.T


def spectrum(x):
    small = x @ x.T if x.shape[0] < x.shape[1] else x.T @ x
    return numpy.sqrt(numpy.linalg.eigvalsh(small))


@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (5, 5)])
def test_iso_c_is_the_papers(shape):
    """``U V^T`` is the polar factor of the sum, which no singular vector needs to be told apart for."""
    experts = taus(*shape).double()
    total = experts.sum(dim=0).numpy()
    expected = 1.3 * spectrum(total).mean() * polar(total)
    got = IsoC(1.3).merged([Whole(tau) for tau in experts]).numpy()
    assert numpy.abs(got - expected).max() < 1e-10 * numpy.abs(expected).max()
    assert numpy.ptp(numpy.linalg.svd(got)[1]) < 1e-12, "all directions weigh the same"


def cts_by_definition(experts, alpha, common):
    least, count = min(experts[0].shape), len(experts)
    own = round((least - int(least * common)) / count)
    u, s, vt = numpy.linalg.svd(sum(experts), full_matrices=False)
    keep = least - own * count
    us, ss, vs = [u[:, :keep]], [s[:keep]], [vt[:keep]]
    for tau in experts:
        rest = tau - us[0] @ us[0].T @ tau
        u, s, vt = numpy.linalg.svd(rest, full_matrices=False)
        us.append(u[:, :own])
        ss.append(s[:own])
        vs.append(vt[:own])
    assert sum(map(len, ss)) == least
    mean = numpy.concatenate(ss).mean()
    return alpha * mean * polar(numpy.concatenate(us, 1)) @ polar(numpy.concatenate(vs, 0).T).T


@pytest.mark.parametrize("shape", [(12, 10), (10, 12), (9, 9)])
@pytest.mark.parametrize("common", [0.0, 0.5, 0.8, 1.0])
def test_iso_cts_is_the_papers(shape, common):
    experts = taus(*shape).double()
    expected = cts_by_definition(list(experts.numpy()), 1.5, common)
    got = IsoCTS(1.5, common).merged([Whole(tau) for tau in experts]).numpy()
    assert numpy.abs(got - expected).max() < 1e-8 * numpy.abs(expected).max()


def test_all_common_is_iso_c():
    experts = taus(6, 8)
    both = [kind.solve("w", {"w": dense(experts)}) for kind in (IsoC(1.2), IsoCTS(1.2, common=1.0))]
    assert (both[0] - both[1]).abs().max() <= gamma(8 * 8) * 8 * both[0].abs().max()


@pytest.mark.parametrize("kind", [IsoC(), IsoCTS(common=0.5)], ids=["IsoC", "IsoCTS"])
def test_factors_give_what_their_products_give(kind):
    generator = torch.Generator().manual_seed(0)
    thin = [
        Product(torch.randn(12, 2, generator=generator).double(), torch.randn(2, 11, generator=generator).double())
        for _ in range(3)
    ]
    got, expected = kind.merged(thin), kind.merged([Whole(one.dense()) for one in thin])
    assert (got - expected).abs().max() < 1e-9 * expected.abs().max()


def test_a_planted_answer():
    """Two experts of one direction each, of lengths 3 and 1: each gets the mean, 2, times alpha."""
    experts = torch.zeros(2, 4, 5)
    experts[0, 1, 2], experts[1, 3, 0] = 3.0, 1.0
    expected = torch.zeros(4, 5)
    expected[1, 2] = expected[3, 0] = 1.5 * 2
    assert (IsoC(1.5).solve("w", {"w": dense(experts)}) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("kind", [IsoC(), IsoCTS()], ids=["IsoC", "IsoCTS"])
def test_nothing_changed_stays_nothing(kind):
    assert torch.equal(kind.solve("w", {"w": dense(torch.zeros(3, 4, 5))}), torch.zeros(4, 5))


def test_numbers_in_range():
    for make in (
        lambda: IsoC(math.nan),
        lambda: IsoCTS(math.inf),
        lambda: IsoCTS(common=1.1),
        lambda: IsoCTS(common=-0.1),
    ):
        with pytest.raises(ConfigError, match="Iso"):
            make()
