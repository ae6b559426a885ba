"""Masks: hand-computed values, slopes by finite differences, and probabilities that samples keep to."""

import math

import pytest
import torch

from adamerge.errors import ConfigError
from adamerge.parametrizations import BinaryMask, ExpectedMask, HardMask, SoftMask
from adamerge.parametrizations.hashed_noise import logistic

X = torch.tensor([-2.0, -0.3, 0.0, 0.7, 3.0])


def test_the_soft_mask_is_the_relaxed_bernoulli_in_float64():
    noise = logistic((4, None, "t"), 5, X.device).double()
    for temperature in (0.1, 0.5, 2.0):
        expected = 1 / (1 + torch.exp(-(noise + X.double()) / temperature))
        assert torch.allclose(SoftMask(4)("t", X, temperature).double(), expected, atol=1e-6)


def test_without_noise_by_hand():
    p = [1 / (1 + math.exp(-x)) for x in X.tolist()]
    assert ExpectedMask()("t", X, 0.5).tolist() == pytest.approx(p)
    assert HardMask()("t", X, 0.5).tolist() == [0, 0, 1, 1, 1]
    assert HardMask(0.6)("t", X, 0.5).tolist() == [0, 0, 0, 1, 1]


def test_the_binary_mask_is_the_soft_one_above_one_half_and_keeps_to_its_probability():
    logits = torch.full((200_000,), 0.8)
    found = BinaryMask(2)("t", logits, 0.5)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    for temperature in (0.2, 0.5):
        assert torch.equal(found, (SoftMask(2)("t", logits, temperature) > 0.5).float())
    p = 1 / (1 + math.exp(-0.8))
    assert float(found.mean()) == pytest.approx(p, abs=5 * (p * (1 - p) / 200_000) ** 0.5)


def test_at_logit_zero_and_half_temperature_the_sample_is_soft():
    """Mean 0.5 and deviation 0.378: numbers of the paper's reference, and no near-binary mask."""
    m = SoftMask()("t", torch.zeros(400_000), 0.5)
    assert float(m.mean()) == pytest.approx(0.5, abs=0.004) and float(m.std()) == pytest.approx(0.378, abs=0.004)


@pytest.mark.parametrize("mask", [SoftMask(1), ExpectedMask()])
def test_the_slope_is_that_of_the_mask(mask):
    step = 1e-3
    slope = mask.slope(mask("t", X, 0.5), 0.5)
    expected = (mask("t", X + step, 0.5).double() - mask("t", X - step, 0.5).double()) / (2 * step)
    assert torch.allclose(slope.double(), expected, atol=3e-4) and slope.abs().max() > 0.1


def test_steps_have_no_slope():
    assert HardMask().slope(torch.ones(2), 0.5) is None and BinaryMask().slope(torch.ones(2), 0.5) is None


def test_seeds_draws_and_names_differ():
    samples = [SoftMask(0), SoftMask(1), SoftMask(0, 0), SoftMask(0, 1), SoftMask(1, 1)]
    found = [mask("t", X, 0.5) for mask in samples] + [SoftMask(0)("u", X, 0.5)]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    assert torch.equal(SoftMask(0, 1)("t", X, 0.5), found[3])


def test_a_threshold_is_a_probability():
    with pytest.raises(ConfigError, match="threshold"):
        HardMask(1.5)
