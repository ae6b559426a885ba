"""Chosen samples: weights by hand, in a sum and one around the other, and what a fit makes of them."""

import math
from functools import partial

import pytest
import torch
from modules import descending
from toy_points import TASKS, ToyClassifier, ToyPoints, fit_toy, logits_of, vectors_of, weights_of
from toys import ToyLanguage, ToyTexts, toy_fit, toy_vectors

from adamerge import LayerWise
from adamerge.backbones import Batch, Encoded, Output, Teacher
from adamerge.errors import ConfigError, DataError
from adamerge.objectives import (
    Entropy,
    ExpertLabels,
    HiddenAlignment,
    LogitAlignment,
    PseudoLabel,
    Sum,
    Unchanged,
    WeightedByConfidence,
    WhereAgreed,
)

LN3 = math.log(3.0)
TAUGHT = Teacher(torch.tensor([[0.0, LN3], [0.0, 0.0], [math.log(9.0), 0.0]]))  # probabilities 3/4, 1/2 and 9/10
BATCH = Batch(torch.zeros(3, 1), teacher=TAUGHT, indices=torch.arange(3))


def predict(inputs):
    """The second class, the second, and the second."""
    return Output(torch.tensor([[0.0, 1.0]] * 3), Encoded(torch.zeros(3, 1)))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [0.75, 0.5, 0.9]),
        ({"power": 2.0}, [0.5625, 0.25, 0.81]),
        ({"threshold": 0.7}, [0.75, 0.0, 0.9]),
        ({"power": 0.0, "threshold": 0.8}, [0.0, 0.0, 1.0]),
    ],
)
def test_weights_by_hand(arguments, expected):
    assert WeightedByConfidence(LogitAlignment(), **arguments).weight(BATCH).tolist() == pytest.approx(expected)


def test_where_both_agree_by_hand():
    """The expert says the second class, either (the first of equals), and the first."""
    objective = WhereAgreed(WeightedByConfidence(ExpertLabels()))
    batch = objective.prepare("one", BATCH, predict)
    assert batch.agreed.tolist() == [True, False, False]
    assert objective.weight(batch).tolist() == pytest.approx([0.75, 0.0, 0.0]), "times what the other one says"
    assert objective.weight(batch.rows(slice(1, 3))).tolist() == [0.0, 0.0]
    with pytest.raises(DataError, match="nobody has asked"):
        objective.weight(BATCH)
    both = Sum([Entropy(), objective])
    assert both.weight(both.prepare("one", BATCH, predict)).tolist() == pytest.approx([0.75, 0.0, 0.0])


def test_they_need_what_the_objective_inside_needs_and_a_teacher():
    one = WhereAgreed(HiddenAlignment([1, -1]))
    assert one.taught and not one.labelled and one.hidden == (1, -1)
    output = Output(torch.tensor([[0.0, 0.0]] * 3), Encoded(torch.zeros(3, 1)))
    assert WhereAgreed(Entropy())(output, BATCH).tolist() == pytest.approx([math.log(2)] * 3)
    with pytest.raises(DataError, match="no teacher"):
        WeightedByConfidence(Entropy()).weight(Batch(torch.zeros(3, 1)))


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_the_loss_of_a_step_is_the_mean_over_samples_that_count(micro_batch):
    """In float64 from the definition: of what the expert is sure of and the merged model predicts too."""
    objective = WhereAgreed(WeightedByConfidence(ExpertLabels(), 0.0, 0.6))
    module = descending(
        ToyClassifier(),
        vectors_of(),
        partial(LayerWise, init=0.3),
        objective,
        1e-9,
        hold=False,
        micro_batch=micro_batch,
    )
    data = ToyPoints(batch_size=20)
    fit_toy(module, data, 1)
    base, experts = weights_of()
    merged = {n: v.double() + 0.3 * sum(e[n].double() - v.double() for e in experts.values()) for n, v in base.items()}
    for task in TASKS:
        indices = data.steps().indices(task, 0)
        points = torch.stack([data.samples(task, "calibration")[index] for index in indices]).double()
        theirs = logits_of({n: v.double() for n, v in experts[task].items()}, task, points).softmax(dim=-1)
        ours = logits_of(merged, task, points).log_softmax(dim=-1)
        sure, label = theirs.max(dim=-1)
        counted = (sure >= 0.6) & (ours.argmax(dim=-1) == label)
        assert 2 < counted.sum() < 19
        right = -ours[torch.arange(20), label][counted].mean()
        assert float(module.evaluation.losses[task]) == pytest.approx(float(right), rel=1e-4)


def test_positions_and_other_samples_are_refused():
    module = descending(ToyLanguage(), toy_vectors(), LayerWise, WhereAgreed(LogitAlignment()))
    with pytest.raises(ConfigError, match="WhereAgreed cannot weigh samples of task 'one'"):
        toy_fit(module, ToyTexts(), 1)
    inner = PseudoLabel(strong=Unchanged(), threshold=0.5)
    module = descending(ToyClassifier(), vectors_of(), LayerWise, WeightedByConfidence(inner))
    with pytest.raises(ConfigError, match="PseudoLabel chooses other samples"):
        fit_toy(module, ToyPoints(), 1)


@pytest.mark.parametrize("arguments", [{"power": -1.0}, {"threshold": 1.0}, {"power": math.inf}])
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ConfigError, match="WeightedByConfidence"):
        WeightedByConfidence(Entropy(), **arguments)
