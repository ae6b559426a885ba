"""Confusions: counts by hand, exchanges that are found, and those that are chance or a model's own weakness."""

import pytest
import torch
from toy_points import ToyClassifier, ToyPoints, logits_of, vectors_of, weights_of

from adamerge.backbones import Encoded, Output
from adamerge.data.metrics import Accuracy, TokenLoss
from adamerge.training.confusions import Confusions, exchanged, exchanged_lines, far_below_lines
from adamerge.training.evaluation import means
from adamerge.training.scorer import Scorer


def test_counts_by_hand_over_two_batches():
    metric = Confusions()
    for predicted, labels in (([0, 1, 1], [0, 0, 1]), ([2, 1], [0, 0])):
        logits = torch.nn.functional.one_hot(torch.tensor(predicted), 3).float()
        output = Output(logits, Encoded(logits))
        assert torch.equal(metric(output, torch.tensor(labels)), Accuracy()(output, torch.tensor(labels)))
    assert metric.counts.tolist() == [[1, 2, 1], [0, 1, 0], [0, 0, 0]]


def good(classes: int, right: int, wrong: int) -> torch.Tensor:
    """Counts of a model that is ``right`` on so many samples of each class, and takes so many for each other one."""
    eye = torch.eye(classes, dtype=torch.int64)
    return right * eye + wrong * (1 - eye)


def test_two_rows_that_are_exchanged_are_found():
    counts = good(7, 240, 10)[:, [0, 1, 5, 3, 4, 2, 6]]
    assert exchanged(counts) == (2, 5, 2 * 230)


def test_a_cycle_of_three_is_found_by_its_best_pair():
    """FER2013: sad, surprised, neutral against neutral, sad, surprise."""
    counts = good(7, 400, 10)[:, [0, 1, 2, 3, 5, 6, 4]]
    a, b, gain = exchanged(counts)
    assert a in (4, 5) and b in (5, 6) and gain == 390


@pytest.mark.parametrize(
    "counts",
    [
        good(7, 240, 10),
        good(2, 55, 45),
        torch.tensor([[50, 50], [50, 50]]),
        torch.tensor([[45, 55], [57, 43]]),  # two classes near chance
        torch.tensor([[0, 900], [0, 100]]),  # all is taken for the rare class
        torch.tensor([[0, 100], [0, 900]]),
        torch.tensor([[1, 3], [3, 1]]),  # too few to tell
        torch.zeros(3, 3, dtype=torch.int64),
    ],
)
def test_what_is_chance_or_weakness_is_not(counts):
    assert exchanged(counts) is None


def test_guesses_of_many_classes_are_chance():
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(400 * 400, (8000,), generator=generator)
    assert exchanged(torch.bincount(cells, minlength=400 * 400).view(400, 400)) is None


def test_lines_name_task_classes_and_gain():
    counts = {"faces": good(3, 80, 10)[:, [1, 0, 2]], "fine": good(3, 80, 10)}
    (line,) = exchanged_lines(counts, {"faces": ("sad", "glad", "mad"), "fine": ("a", "b", "c")}, "its expert")
    assert line.startswith(
        "task 'faces': labels and rows of the head seem to mean other classes: its expert is right on"
    )
    assert "'sad' (label 0) and 'glad' (label 1)" in line and "33.3 % of 300" in line and "on 80.0 %" in line
    (unnamed,) = exchanged_lines({"faces": counts["faces"]}, {"faces": ()}, "it")
    assert "with 0 (label 0) and 1 (label 1)" in unnamed


@pytest.mark.parametrize(
    ("base", "expert", "metric", "told"),
    [
        ([1.0] * 60 + [0.0] * 40, [1.0] * 39 + [0.0] * 61, Accuracy(), True),
        ([1.0] * 60 + [0.0] * 40, [1.0] * 57 + [0.0] * 43, Accuracy(), False),  # not far
        ([1.0, 1.0, 1.0], [1.0, 1.0, 0.0], Accuracy(), False),  # far, and of three samples
        ([1.0], [0.0], Accuracy(), False),
        ([0.4] * 50, [0.9] * 50, Accuracy(), False),
        ([3.0, 3.2] * 50, [3.5, 3.6] * 50, TokenLoss(), True),
        ([3.5, 3.6] * 50, [3.0, 3.2] * 50, TokenLoss(), False),
    ],
)
def test_an_expert_far_below_the_base(base, expert, metric, told):
    scores = [{"one": torch.tensor(values)} for values in (base, expert)]
    lines = list(far_below_lines(scores[0] | {"other": torch.ones(2)}, scores[1], metric))
    assert len(lines) == told
    if told:
        assert lines[0].startswith(f"task 'one': its own expert is far below the base, {metric.name} ")
        assert metric.unit in lines[0]


class Learned(ToyPoints):
    """Points labelled by each task's expert; those of task 'two' as if two rows of its head were exchanged."""

    meaning = {"one": [0, 1, 2], "two": [2, 1, 0]}

    def load(self, task):
        _, experts = weights_of(("one", "two", "three"))
        splits = super().load(task)
        for split, rows in splits.items():
            classes = logits_of(experts[task], task, torch.tensor(rows["point"])).argmax(dim=1)
            labels = [self.meaning[task][int(number)] for number in classes]
            splits[split] = rows.remove_columns("label").add_column("label", labels)
        return splits


def test_a_scorer_tells_which_tasks_labels_mean_other_classes():
    scorer = Scorer(ToyClassifier(), Learned(rows=200), vectors_of(), "test")
    base, experts = scorer.base(), scorer.experts()
    assert means(experts)["one"] == 1.0 and means(experts)["two"] < 0.7 * means(base)["two"]
    with pytest.warns(UserWarning, match="task 'two'"):
        far, exchange = scorer.doubts(base, experts)
    assert far.startswith("task 'two': its own expert is far below the base")
    assert "'a' (label 0) and 'c' (label 2) exchanged on 100.0 %" in exchange
    assert scorer.confusions["one"].sum() == 200 and scorer.confusions["two"].diagonal().sum() < 100
