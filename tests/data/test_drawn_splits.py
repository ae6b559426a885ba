"""Drawing: splits are disjoint, lose nothing, and follow the seed alone."""

import datasets
import torch

from adamerge.data.drawn_splits import draw

ROWS = datasets.Dataset.from_dict({"number": list(range(30))})


def test_splits_lie_one_behind_the_other_in_a_permutation():
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5)).tolist()
    found = draw(ROWS, {"a": 0.1, "b": 0.35}, 5)
    # 10.5 rows are 10: rounding is to even
    assert {split: rows["number"][:] for split, rows in found.items()} == {
        "a": order[:3],
        "b": order[3:13],
        "train": order[13:],
    }


def test_no_more_is_drawn_than_there_is():
    found = draw(ROWS, {"a": 0.8, "b": 0.1, "c": 0.2}, 0)
    assert {split: len(rows) for split, rows in found.items()} == {"a": 24, "b": 3, "c": 3, "train": 0}
    assert sorted(number for rows in found.values() for number in rows["number"]) == list(range(30))
