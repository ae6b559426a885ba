"""Labels: a column of classes, or the tokens of the samples themselves; and shots drawn of each class."""

import datasets
import pytest
import torch

from adamerge.data.class_labels import LabelPlace
from adamerge.data.labels import ClassLabels, TokenLabels, shots
from adamerge.data.metrics import Accuracy, TokenLoss
from adamerge.data.samples import Samples
from adamerge.errors import DataError


class Following:
    def labels(self, sample):
        return torch.cat([sample[1:], torch.tensor([-100])])


def never():
    raise AssertionError("no sample is needed")


@pytest.fixture
def rows():
    return datasets.Dataset.from_dict({"text": ["abc", "d", "ef"], "label": [2, 0, 2]})


WHERE = LabelPlace("t", "test", ("a", "b", "c"))


def test_classes_are_a_column(rows):
    source = ClassLabels()
    assert source.has(rows) and not source.has(rows.remove_columns("label")) and isinstance(source.metric, Accuracy)
    labels = source.of(rows, never, None, WHERE)
    assert [int(labels[i]) for i in range(len(labels))] == [2, 0, 2] and labels[0].dtype == torch.int64
    source.check(rows, WHERE)
    for refuses in (source.check, lambda bare, where: source.of(bare, never, None, where)):
        with pytest.raises(DataError, match="task 't', test split has no labels"):
            refuses(rows.remove_columns("label"), WHERE)
        with pytest.raises(DataError, match="task 't', test split: column 'label' holds 2 in row 0"):
            refuses(rows, WHERE._replace(classnames=("a", "b")))


def test_tokens_are_the_labels_of_every_text(rows):
    source, bare = TokenLabels(), rows.remove_columns("label")
    samples = Samples(bare, ["text"], lambda text: torch.tensor([ord(text[0]), 7]), "t")
    assert source.has(bare) and isinstance(source.metric, TokenLoss)
    source.check(rows, WHERE)
    assert source.oddity(rows, WHERE._replace(classnames=())) is None and ClassLabels().oddity(rows, WHERE) is None
    assert "cannot be scored" in ClassLabels().oddity(bare, WHERE)
    labels = source.of(bare, lambda: samples, Following(), WHERE)
    assert len(labels) == 3 and labels[2].tolist() == [7, -100]


def test_shots_are_so_many_of_each_class():
    labels = [0, 1, 1, 0, 2, 2, 2, 0]

    def drawn(seed, usable=lambda number: True):
        return shots(labels, 3, 2, torch.Generator().manual_seed(seed), "task 't'", usable)

    assert [labels[i] for i in drawn(0)] == [0, 0, 1, 1, 2, 2]
    assert drawn(0) == drawn(0) and len({tuple(drawn(seed)) for seed in range(9)}) > 1
    with pytest.raises(DataError, match="class 1 has fewer samples than shots"):
        shots(labels, 3, 3, torch.Generator(), "task 't'")
    # in place of one that cannot be used another of its class is drawn, and the rest stay
    first = drawn(0)[0]
    assert drawn(0, lambda number: number != first) == [drawn(0)[1], *({0, 3, 7} - set(drawn(0)[:2])), *drawn(0)[2:]]
