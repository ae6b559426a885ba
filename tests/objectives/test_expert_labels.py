"""Expert labels: numbers by hand, positions that do not count, and the largest logits alone."""

import math

import pytest
import torch

from adamerge.backbones import Batch, Encoded, Output, Teacher
from adamerge.errors import DataError
from adamerge.objectives import ExpertLabels
from adamerge.objectives.expert_labels import classes_of

LN3 = math.log(3.0)


def losses(ours, theirs, classes=None, mask=None):
    output = Output(ours, Encoded(torch.zeros(len(ours), 1), mask=mask))
    return ExpertLabels()(output, Batch(torch.zeros(len(ours), 1), teacher=Teacher(theirs, classes)))


def test_three_numbers_by_hand():
    """Probabilities 1/2, 3/4 and 1/4 of the classes that the expert predicts."""
    ours = torch.tensor([[0.0, 0.0], [0.0, LN3], [0.0, LN3]])
    theirs = torch.tensor([[5.0, 1.0], [0.0, 0.1], [2.0, -2.0]])
    assert losses(ours, theirs).tolist() == pytest.approx([math.log(2), math.log(4 / 3), math.log(4)])


def test_of_the_largest_logits_the_class_is_the_one_that_they_are_of():
    theirs, kept = torch.tensor([[9.0, 8.0], [1.0, 2.0]]), torch.tensor([[2, 0], [1, 2]], dtype=torch.int32)
    assert classes_of(Teacher(theirs, kept)).tolist() == [2, 2]
    ours = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, math.log(2)]])
    assert losses(ours, theirs, kept).tolist() == pytest.approx([LN3, math.log(2)])


def test_positions_that_do_not_count_change_nothing():
    """The merged model's batch is longer than the teacher's."""
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 4, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]], dtype=torch.bool)
    logs = ours.double().log_softmax(dim=-1)
    right = [
        -sum(logs[i, p, theirs[i, p].argmax()] for p in places) / len(places) for i, places in enumerate(([0, 2], [1]))
    ]
    assert losses(ours, theirs, mask=mask).tolist() == pytest.approx([float(value) for value in right], abs=1e-6)


def test_without_a_teacher_it_says_so():
    with pytest.raises(DataError, match="no teacher"):
        ExpertLabels()(Output(torch.zeros(1, 2), Encoded(torch.zeros(1, 1))), Batch(torch.zeros(1, 1)))
