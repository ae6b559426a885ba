"""Checks: what a fit reads of its data is read before anything is written, and nothing else."""

import datasets
import pytest

from adamerge.data.checks import check
from adamerge.errors import DataError

from .test_base import Noise, Pictures


class Numbered(Noise):
    """One more than their classes, in the split that is named."""

    wrong = "validation"

    def load(self, task):
        splits = super().load(task)
        labels = [label + 1 for label in splits[self.wrong]["label"]]
        plain = splits[self.wrong].remove_columns("label").add_column("label", labels)
        return splits | {self.wrong: plain}


def test_labels_are_read_where_the_fit_reads_them():
    data = Numbered()
    check(data, Pictures(), validated=False)
    with pytest.raises(DataError, match="task 'colours', validation split") as error:
        check(Numbered(), Pictures(), validated=True)
    assert error.value.todo.endswith("or let the fit score nothing: trainer.limit_val_batches=0")
    data = Numbered(labelled=True)
    data.wrong = "calibration"
    with pytest.raises(DataError, match="task 'colours', calibration split"):
        check(data, Pictures(), validated=False)


@pytest.mark.parametrize("labelled", [False, True])
def test_numbers_from_one_on_are_told_by_a_split_that_is_not_scored(labelled):
    data = Numbered(labelled=labelled)
    data.wrong = "train"
    with pytest.raises(DataError, match="task 'colours', train split: .*none of the classes"):
        check(data, Pictures(), validated=True)
    check(data, Pictures(), validated=False)


def test_samples_of_the_splits_that_are_used_are_read():
    for validated, splits in ((False, {"calibration"}), (True, {"calibration", "validation"})):
        data, pictures = Noise(), Pictures()
        check(data, pictures, validated)
        assert {split for _, split in data._samples} == splits
        assert sum(pictures.decoded.values()) == 2 * sum(data.sizes[split] for split in splits)


def test_a_split_without_rows_is_refused():
    class Bare(Noise):
        def load(self, task):
            return {"calibration": datasets.Dataset.from_dict({"image": [], "label": []})}

    with pytest.raises(DataError, match="calibration split is empty"):
        check(Bare(), Pictures(), validated=False)
