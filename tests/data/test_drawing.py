"""Drawing: splits are disjoint, lose nothing, and follow the seed alone."""

import datasets
import pytest
import torch

from adamerge.data.drawing import draw
from adamerge.errors import ConfigError

ROWS = datasets.Dataset.from_dict({"number": list(range(30))})


def test_splits_lie_one_behind_the_other_in_a_permutation():
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5)).tolist()
    found = draw(ROWS, {"a": 0.1, "b": 0.35}, 5, "here")
    # 10.5 rows are 10: rounding is to even
    assert {split: rows["number"][:] for split, rows in found.items()} == {
        "a": order[:3],
        "b": order[3:13],
        "train": order[13:],
    }


def test_shares_that_leave_nothing_are_refused():
    assert len(draw(ROWS, {"a": 0.5, "b": 0.4}, 0, "here")["train"]) == 3
    with pytest.raises(ConfigError, match="here: the shares of a, b, which are drawn, must sum to less than 1"):
        draw(ROWS, {"a": 0.5, "b": 0.5}, 0, "here")
