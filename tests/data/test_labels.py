"""Labels: a column of classes, or the tokens of the samples themselves; and shots drawn of each class."""

import datasets
import pytest
import torch

from adamerge.data.class_labels import LabelPlace
from adamerge.data.labels import ClassLabels, TokenLabels
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


def test_labels_that_begin_at_one_are_told_by_any_split():
    rows, where = datasets.Dataset.from_dict({"label": [1, 2, 3]}), LabelPlace("t", "train", ("a", "b", "c"))
    with pytest.raises(DataError, match="none of the classes"):
        ClassLabels().check_numbering(rows, where)
    for fine in ([1, 2], [0, 1, 2], [1, 4]):  # the last is told where it is scored
        ClassLabels().check_numbering(datasets.Dataset.from_dict({"label": fine}), where)
    ClassLabels().check_numbering(datasets.Dataset.from_dict({"text": ["x"]}), where)
    TokenLabels().check_numbering(rows, where)
