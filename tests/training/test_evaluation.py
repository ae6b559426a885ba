"""Evaluation: scores, gaps, paired errors and spreads by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import one_hot

from adamerge.backbones import IGNORED, Batch, Encoded, Output
from adamerge.data.batch_order import labelled_batch
from adamerge.data.metrics import Accuracy
from adamerge.errors import DataError
from adamerge.training.evaluation import Spread, average, gap_closed, means, paired_step, score


class Echo:
    """A merged model whose logits are its inputs."""

    device = torch.device("cpu")
    copy = SimpleNamespace(whole=True)
    backbone = SimpleNamespace(output=lambda own, task: Output(own.features + (task == "shifted"), own))

    def __call__(self, inputs):
        assert not torch.is_grad_enabled()
        return Encoded(inputs)


def test_accuracy_compares_the_largest_logit_with_the_label_in_order():
    logits = torch.tensor([[0.0, 1.0, 0.5], [3.0, 1.0, 0.5], [0.0, 1.0, 1.5], [2.0, 1.0, 0.0]])
    labels = torch.tensor([1, 1, 2, 0])
    batches = [Batch(logits[:3], labels[:3]), Batch(logits[3:], labels[3:])]
    hits = score(Echo(), "task", iter(batches), Accuracy())
    assert hits.tolist() == [1.0, 0.0, 1.0, 1.0]
    assert means({"task": hits}) == {"task": 0.75}


def test_evaluation_needs_labels_and_samples():
    with pytest.raises(DataError, match="task 'cars': evaluation needs labels"):
        score(Echo(), "cars", [Batch(torch.zeros(2, 3))], Accuracy())
    with pytest.raises(DataError, match="task 'cars': there is nothing"):
        score(Echo(), "cars", [], Accuracy())


class Texts(Echo):
    """Says of each position the token that stands there, and keeps how much ran."""

    def __init__(self, whole=True):
        self.copy, self.ran = SimpleNamespace(whole=whole), []

    def __call__(self, inputs):
        self.ran.append(inputs["input_ids"].numel())
        return Encoded(one_hot(inputs["input_ids"], 5).float(), mask=inputs["attention_mask"] > 0)


def texts(*sizes, seed=0):
    """A loader's batch of texts of these many tokens, whose labels are the tokens but for some."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(5, (size,), generator=generator) for size in sizes]
    labels = [own.where(torch.rand(len(own), generator=generator) < 0.7, torch.tensor(0)) for own in ids]
    inputs = [{"input_ids": own, "attention_mask": torch.ones_like(own)} for own in ids]
    return labelled_batch(list(zip(inputs, labels, strict=True)))


class Right:
    """The share of a text's positions that are its labels."""

    def __call__(self, output, labels):
        hits = (output.cropped(labels.shape[1]).argmax(dim=-1) == labels) & (labels != IGNORED)
        return output.mean(hits.float())


def test_texts_of_like_length_run_together_and_their_scores_stay_in_order():
    sizes = [3, 90, 5, 80, 4]
    model, whole, batch = Texts(), Texts(whole=False), texts(*sizes)
    scores = score(model, "task", [batch], Right())
    assert sum(model.ran) == 3 * 5 + 2 * 90 and whole.ran == []
    alone = [score(Texts(), "task", [one], Right()) for one in single(batch, sizes)]
    assert torch.equal(scores, torch.cat(alone)) and len(set(scores.tolist())) > 2
    assert torch.equal(score(whole, "task", [batch], Right()), scores) and whole.ran == [5 * 90], "merges in each pass"


def single(batch, sizes):
    """Each text as a batch of its own, without padding."""
    for row, size in enumerate(sizes):
        inputs = {name: value[row : row + 1, :size] for name, value in batch.inputs.items()}
        yield Batch(inputs, batch.labels[row : row + 1, :size])


def test_the_average_counts_tasks_not_samples():
    hits = {"small": torch.tensor([True]), "large": torch.zeros(999, dtype=torch.bool)}
    assert average(means(hits)) == 0.5


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


def prediction_spread(logits, mask=None):
    found = Spread()
    half = len(logits) // 2
    for part in (slice(0, half), slice(half, None)):
        found.update(logits[part], None if mask is None else mask[part])
    return found.marginal_entropy(), found.top_class_share()


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


def test_spreads_of_several_processes_add_up():
    logits = torch.randn(7, 5)
    whole, parts = Spread(), [Spread(), Spread()]
    whole.update(logits)
    for part, rows in zip(parts, logits.split([4, 3]), strict=True):
        part.update(rows)
    together = Spread(parts[0].sums() + parts[1].sums())
    assert float(together.top_class_share()) == pytest.approx(float(whole.top_class_share()))
    assert float(together.marginal_entropy()) == pytest.approx(float(whole.marginal_entropy()), rel=1e-6)


def test_spread_of_half_precision_logits_is_fp32():
    entropy, share = prediction_spread(torch.randn(300, 10).to(torch.bfloat16))
    assert entropy.dtype == share.dtype == torch.float32 and 0 < float(entropy) <= 1


def test_spread_counts_the_positions_that_count():
    logits = torch.zeros(2, 2, 3)
    logits[0, 0, 1] = logits[1, 1, 1] = 50.0
    mask = torch.tensor([[True, False], [False, True]])
    entropy, share = prediction_spread(logits, mask)
    assert float(entropy) == pytest.approx(0.0, abs=1e-6) and float(share) == 1.0
