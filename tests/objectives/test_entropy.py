"""Entropy: hand-computed numbers, extremes and gradients."""

import math

import pytest
import torch

from adamerge.backbones import Batch, Encoded, Output
from adamerge.objectives import Entropy


def entropy(logits, **arguments):
    output = Output(torch.as_tensor(logits), Encoded(torch.zeros(len(logits), 1)))
    return Entropy(**arguments)(output, Batch(torch.zeros(len(logits), 1)))


def test_three_numbers_by_hand():
    # p = (1/4, 3/4): H = 1/4 log 4 + 3/4 log(4/3) = 0.5623351446
    logits = [[0.0, math.log(3.0)], [5.0, 5.0], [0.0, 200.0]]
    assert entropy(logits).tolist() == pytest.approx([0.5623351446, math.log(2), 0.0], abs=1e-6)
    expected = [0.8112781245, 1.0, 0.0]  # in bits, which is what division by log 2 gives
    assert entropy(logits, normalise=True).tolist() == pytest.approx(expected, abs=1e-6)


def test_uniform_over_any_number_of_classes():
    for classes in (2, 10, 397):
        assert entropy(torch.zeros(1, classes)).item() == pytest.approx(math.log(classes), rel=1e-6)
        assert entropy(torch.zeros(1, classes), normalise=True).item() == pytest.approx(1.0, rel=1e-6)


def test_adding_a_constant_to_the_logits_changes_nothing():
    logits = torch.tensor([[1.0, 2.0, -1.0]])
    assert entropy(logits + 64).item() == pytest.approx(entropy(logits).item(), rel=1e-6)


def test_extreme_logits_give_finite_numbers_and_gradients():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e38, 0.0, 0.0]], requires_grad=True)
    losses = entropy(logits)
    assert losses.tolist() == pytest.approx([0.0, math.log(2)], abs=1e-6)
    assert torch.isfinite(torch.autograd.grad(losses.sum(), logits)[0]).all()


@pytest.mark.parametrize("normalise", [False, True])
def test_gradient_is_minus_p_times_log_p_plus_entropy(normalise):
    torch.manual_seed(0)
    logits = torch.randn(5, 7, requires_grad=True)
    found = torch.autograd.grad(entropy(logits, normalise=normalise).sum(), logits)[0]
    p = logits.detach().double().softmax(dim=-1)
    expected = -p * (p.log() - (p * p.log()).sum(dim=-1, keepdim=True)) / (math.log(7) if normalise else 1)
    assert (found.double() - expected).abs().max() < 1e-6


def test_half_precision_logits_are_computed_in_fp32():
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    p = logits.double().softmax(dim=-1)
    assert entropy(logits).dtype == torch.float32
    assert entropy(logits).item() == pytest.approx(-float((p * p.log()).sum()), rel=1e-6)


def test_it_has_no_parameters_and_asks_for_no_labels():
    assert not list(Entropy().parameters()) and not Entropy().labelled
