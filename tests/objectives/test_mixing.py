"""Mixing: each sample with the next of a circle, by the weights of the paper, whatever the order of the batch."""

import math

import pytest
import torch

from adamerge.errors import ConfigError
from adamerge.objectives import MixInputs
from adamerge.objectives.mixing import partners_of
from adamerge.objectives.views import seeds_of

from .test_views import IMAGES, SEEDS


def test_partners_are_a_circle_through_all_samples():
    for size in (1, 2, 3, 17):
        partners, at, seen = partners_of(SEEDS[:size]).tolist(), 0, []
        for _ in range(size):
            seen.append(at)
            at = partners[at]
        assert at == 0 and sorted(seen) == list(range(size))
    others = partners_of(seeds_of(0, 4, torch.arange(17)))
    assert others.tolist() != partners_of(SEEDS[:17]).tolist(), "another step, another circle"


def test_a_blend_is_a_function_of_the_tasks_whole_batch():
    """In whatever order the samples stand; one sample more or less changes blends."""
    view = MixInputs()
    whole = view(IMAGES[:20], SEEDS[:20])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert torch.equal(view(IMAGES[order], SEEDS[order]), whole[order])
    assert not torch.equal(view(IMAGES[:19], SEEDS[:19]), whole[:19])
    assert torch.equal(view(IMAGES[:1], SEEDS[:1]), IMAGES[:1]), "alone it stays as it is"


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_blends_are_the_formulas(alpha):
    view = MixInputs(alpha)
    found, partners, weights = view(IMAGES, SEEDS), partners_of(SEEDS), view.weights(SEEDS)
    for i in range(64):
        share, own, other = float(weights[i]), IMAGES[i].double(), IMAGES[partners[i]].double()
        assert (found[i].double() - (share * own + (1 - share) * other)).abs().max() <= 0.5 + 1e-3
        assert int(partners[i]) != i


@pytest.mark.parametrize("alpha", [1.0, 0.5, 0.2])
def test_weights_are_of_the_beta_distribution(alpha):
    """Mean 1/2, variance 1 / (4 (2 alpha + 1)); of alpha = 1/2 the distribution is known: 2/pi arcsin(sqrt(l))."""
    weights = MixInputs(alpha).weights(seeds_of(0, 3, torch.arange(40000))).double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert ((weights >= 0) & (weights <= 1)).all()
    assert abs(weights.mean() - 0.5) < 5 * math.sqrt(variance / 40000)
    assert abs(weights.var() - variance) < 5 * math.sqrt(1 / 16 / 40000)
    if alpha == 0.5:
        for bound in (0.1, 0.3, 0.8):
            right = 2 / math.pi * math.asin(math.sqrt(bound))
            assert abs((weights <= bound).double().mean() - right) < 5 * 0.5 / math.sqrt(40000)


@pytest.mark.parametrize("alpha", [0.0, -1.0, 1.5])
def test_numbers_out_of_range_are_refused(alpha):
    with pytest.raises(ConfigError, match="MixInputs"):
        MixInputs(alpha)


@pytest.mark.parametrize("inputs", [torch.zeros(2, 3, 4, 4), {"a": torch.zeros(2)}])
def test_what_is_no_image_is_refused(inputs):
    with pytest.raises(ConfigError, match="is for images"):
        MixInputs()(inputs, SEEDS[:2])
