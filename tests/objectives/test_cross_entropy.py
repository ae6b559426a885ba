"""Cross-entropy: hand-computed numbers for classes and tokens, positions that do not count, gradients."""

import math

import pytest
import torch

from adamerge.backbones import IGNORED, Batch, Encoded, Output
from adamerge.errors import DataError
from adamerge.objectives import CrossEntropy


def loss(logits, labels, mask=None):
    output = Output(logits, Encoded(torch.zeros(len(logits), 1), mask=mask))
    return CrossEntropy()(output, Batch(torch.zeros(len(logits), 1), None if labels is None else torch.tensor(labels)))


def test_three_classes_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)], [5.0, 5.0]])
    assert loss(logits, [1, 0, 0]).tolist() == pytest.approx([math.log(4 / 3), math.log(4), math.log(2)], abs=1e-6)


def test_tokens_are_averaged_over_the_labelled_positions_of_each_sample():
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0], [9.0, 0.0]], [[0.0, 0.0], [0.0, 7.0], [0.0, 7.0]]])
    labels = [[1, 0, IGNORED], [IGNORED, IGNORED, IGNORED]]
    expected = [(math.log(4 / 3) + math.log(2)) / 2, 0.0]
    assert loss(logits, labels).tolist() == pytest.approx(expected, abs=1e-6)


def test_positions_that_other_tasks_asked_for_change_nothing():
    """Tasks run jointly: their shorter samples come back padded, their labels do not."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 5), [[1, 2, IGNORED], [4, IGNORED, 0]]
    padded = torch.cat([logits, 100 * torch.randn(2, 4, 5)], dim=1)
    mask = torch.zeros(2, 7, dtype=torch.bool)
    assert torch.equal(loss(padded, labels, mask), loss(logits, labels))


def test_gradient_is_p_minus_one_at_the_label_shared_over_positions():
    torch.manual_seed(1)
    logits = torch.randn(2, 3, 4, requires_grad=True)
    labels = [[1, 2, 0], [3, IGNORED, 0]]
    found = torch.autograd.grad(loss(logits, labels).sum(), logits)[0]
    expected = torch.zeros(2, 3, 4, dtype=torch.float64)
    for sample, row in enumerate(labels):
        counted = [position for position, label in enumerate(row) if label != IGNORED]
        for position in counted:
            p = logits.detach()[sample, position].double().softmax(dim=0)
            p[row[position]] -= 1
            expected[sample, position] = p / len(counted)
    assert (found.double() - expected).abs().max() < 1e-7


def test_half_precision_logits_are_computed_in_fp32():
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    assert loss(logits, [2]).item() == pytest.approx(-float(logits.double().log_softmax(dim=-1)[0, 2]), rel=1e-6)


def test_it_asks_for_labels_and_says_when_there_are_none():
    assert CrossEntropy.labelled and not CrossEntropy.taught
    with pytest.raises(DataError, match="no labels"):
        loss(torch.zeros(1, 2), None)
