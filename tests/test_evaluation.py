"""Evaluation: accuracies, gaps, paired errors and spreads by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from adamerge.backbones import Batch, Output
from adamerge.errors import DataError
from adamerge.evaluation import accuracies, average, correct, gap_closed, paired_step, prediction_spread


class Echo:
    """A merged model whose logits are its inputs."""

    device = torch.device("cpu")
    backbone = SimpleNamespace(output=lambda features, task: Output(features + (task == "shifted"), features))

    def __call__(self, inputs):
        assert not torch.is_grad_enabled()
        return inputs


def test_correct_compares_the_largest_logit_with_the_label_in_order():
    logits = torch.tensor([[0.0, 1.0, 0.5], [3.0, 1.0, 0.5], [0.0, 1.0, 1.5], [2.0, 1.0, 0.0]])
    labels = torch.tensor([1, 1, 2, 0])
    batches = [Batch(logits[:3], labels[:3]), Batch(logits[3:], labels[3:])]
    hits = correct(Echo(), "task", iter(batches))
    assert hits.tolist() == [True, False, True, True] and hits.dtype == torch.bool
    assert accuracies({"task": hits}) == {"task": 0.75}


def test_evaluation_needs_labels_and_samples():
    with pytest.raises(DataError, match="task 'cars': evaluation needs labels"):
        correct(Echo(), "cars", [Batch(torch.zeros(2, 3))])
    with pytest.raises(DataError, match="task 'cars': there is nothing"):
        correct(Echo(), "cars", [])


def test_the_average_counts_tasks_not_samples():
    hits = {"small": torch.tensor([True]), "large": torch.zeros(999, dtype=torch.bool)}
    assert average(accuracies(hits)) == 0.5


@pytest.mark.parametrize(
    ("method", "floor", "ceiling", "expected"),
    [(0.5, 0.5, 0.9, 0.0), (0.9, 0.5, 0.9, 1.0), (0.6, 0.5, 0.9, 0.25), (0.4, 0.5, 0.9, -0.25), (0.95, 0.9, 0.8, -0.5)],
)
def test_gap_closed(method, floor, ceiling, expected):
    assert gap_closed(method, floor, ceiling) == pytest.approx(expected)


def test_no_gap_is_not_a_number():
    assert math.isnan(gap_closed(0.7, 0.5, 0.5))


def test_paired_step_by_hand():
    # task one: differences 1, 0, 0, 0 -> mean 1/4, variance 1/4; task two: 1, -1 -> mean 0, variance 2
    better = {"one": torch.tensor([1, 1, 0, 0]) > 0, "two": torch.tensor([1, 0]) > 0}
    worse = {"one": torch.tensor([0, 1, 0, 0]) > 0, "two": torch.tensor([0, 1]) > 0}
    step, error = paired_step(better, worse)
    assert step == pytest.approx(0.125)
    assert error == pytest.approx(math.sqrt((0.25 / 4 + 2 / 2) / 4))


def test_the_paired_error_is_the_spread_of_repeated_draws():
    generator = torch.Generator().manual_seed(0)
    steps, errors = [], []
    for _ in range(400):
        draws = torch.rand(2, 60, generator=generator)
        better = {"one": draws[0] < 0.8, "two": draws[1][:20] < 0.6}
        worse = {"one": draws[0] < 0.7, "two": draws[1][:20] < 0.5}
        step, error = paired_step(better, worse)
        steps.append(step)
        errors.append(error)
    assert float(torch.tensor(steps).mean()) == pytest.approx(0.1, abs=0.01)
    assert float(torch.tensor(errors).mean()) == pytest.approx(float(torch.tensor(steps).std()), rel=0.15)


def test_identical_models_have_no_step_and_no_error():
    hits = {"one": torch.tensor([True, False, True])}
    assert paired_step(hits, hits) == (0.0, 0.0)


def test_spread_by_hand():
    entropy, share = prediction_spread(torch.tensor([[9e3, 0.0, 0.0]] * 5))
    assert float(entropy) == pytest.approx(0.0, abs=1e-6) and float(share) == 1.0
    entropy, share = prediction_spread(100.0 * torch.eye(4))
    assert float(entropy) == pytest.approx(1.0, rel=1e-6) and float(share) == 0.25
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(3.0), 0.0], [0.0, math.log(3.0)]])
    p = (0.25 + 0.75 + 0.25) / 3
    expected = -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)
    entropy, share = prediction_spread(logits)
    assert float(entropy) == pytest.approx(expected, rel=1e-5) and float(share) == pytest.approx(2 / 3)


def test_spread_of_half_precision_logits_is_fp32():
    entropy, share = prediction_spread(torch.randn(300, 10).to(torch.bfloat16))
    assert entropy.dtype == share.dtype == torch.float32 and 0 < float(entropy) <= 1
