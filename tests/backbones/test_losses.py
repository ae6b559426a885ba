"""Losses of language models, by hand."""

import math

import pytest
import torch

from adamerge.backbones import IGNORED
from adamerge.backbones.losses import token_losses


def test_a_samples_loss_is_the_mean_over_its_labelled_tokens():
    # p(label) is 3/4, then 1/2; the third position does not count, and of the second sample none does
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0], [9.0, 0.0]], [[0.0, 0.0]] * 3])
    labels = torch.tensor([[1, 0, IGNORED], [IGNORED] * 3])
    assert token_losses(logits, labels).tolist() == pytest.approx([(math.log(4 / 3) + math.log(2)) / 2, 0.0], rel=1e-6)


def test_half_precision_logits_have_a_loss_in_fp32():
    losses = token_losses(torch.zeros(1, 2, 8, dtype=torch.bfloat16), torch.tensor([[3, 5]]))
    assert losses.dtype == torch.float32 and losses.item() == pytest.approx(math.log(8))
