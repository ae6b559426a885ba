"""Metrics: scores of samples by hand, and which way is up."""

import math

import pytest
import torch

from adamerge.backbones import IGNORED, Encoded, Output
from adamerge.backbones.losses import token_losses
from adamerge.data.metrics import Accuracy, TokenLoss


def test_accuracy_by_hand():
    logits = torch.tensor([[0.0, 1.0, 0.5], [3.0, 1.0, 0.5], [0.0, 1.0, 1.5]])
    assert Accuracy()(Output(logits, Encoded(logits)), torch.tensor([1, 1, 2])).tolist() == [1.0, 0.0, 1.0]



def test_token_loss_by_hand():
    # p(label) is 3/4, then 1/2; the third position does not count
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0], [9.0, 0.0]], [[0.0, 0.0]] * 3])
    labels = torch.tensor([[1, 0, IGNORED], [IGNORED] * 3])
    expected = [(math.log(4 / 3) + math.log(2)) / 2, 0.0]
    assert token_losses(logits, labels).tolist() == pytest.approx(expected, rel=1e-6)
    mask = labels != IGNORED
    longer = torch.cat([logits, torch.full((2, 2, 2), 7.0)], dim=1)  # padding that another task's samples asked for
    output = Output(longer, Encoded(longer, mask=torch.nn.functional.pad(mask, (0, 2))))
    assert TokenLoss()(output, labels).tolist() == pytest.approx(expected, rel=1e-6)


def test_the_best_score_depends_on_the_metric():
    scores = {0.1: 0.5, 0.2: 0.7, 0.3: 0.6}
    assert Accuracy().best(scores) == 0.2 and TokenLoss().best(scores) == 0.1
