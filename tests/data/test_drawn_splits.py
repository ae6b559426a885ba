"""Drawing: splits are disjoint, lose nothing, and follow the seed alone."""

import datasets
import pytest
import torch

from adamerge.data.drawn_splits import draw, draw_some, needed
from adamerge.errors import DataError

ROWS = datasets.Dataset.from_dict({"number": list(range(30))})


def test_splits_lie_one_behind_the_other_in_a_permutation():
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5)).tolist()
    drawn = draw(ROWS, {"a": 0.1, "b": 0.35}, 5)
    # 10.5 rows are 10: rounding is to even
    assert {split: rows["number"][:] for split, rows in drawn.items()} == {
        "a": order[:3],
        "b": order[3:13],
        "train": order[13:],
    }


def test_no_more_is_drawn_than_there_is():
    drawn = draw(ROWS, {"a": 0.8, "b": 0.1, "c": 0.2}, 0)
    assert {split: len(rows) for split, rows in drawn.items()} == {"a": 24, "b": 3, "c": 3, "train": 0}
    assert sorted(number for rows in drawn.values() for number in rows["number"]) == list(range(30))


def test_some_rows_are_the_first_of_a_permutation():
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5)).tolist()
    assert draw_some(ROWS, 4, 5)["number"][:] == order[:4] and draw_some(ROWS, 99, 5)["number"][:] == order


def test_a_split_that_must_be_there():
    assert needed({"test": ROWS}, "test", "t") is ROWS
    for splits, what in (({}, "missing"), ({"test": ROWS.select([])}, "empty")):
        with pytest.raises(DataError, match=f"task 't': the test split is {what}"):
            needed(splits, "test", "t")
