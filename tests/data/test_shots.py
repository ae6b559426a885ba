"""Shots: so many of each class, by a seed, of rows that can be used."""

import datasets
import pytest

from adamerge.data.class_labels import LabelPlace
from adamerge.data.shots import draw_shots
from adamerge.errors import DataError

LABELS = [0, 1, 1, 0, 2, 2, 2, 0]
ROWS = datasets.Dataset.from_dict({"label": LABELS})
WHERE = LabelPlace("t", "calibration", ("a", "b", "c"))


def drawn(seed, usable=None, each=2):
    return draw_shots(ROWS, WHERE, each, seed, usable)


def test_shots_are_so_many_of_each_class():
    assert [LABELS[i] for i in drawn(0)] == [0, 0, 1, 1, 2, 2]
    assert drawn(0) == drawn(0) and len({tuple(drawn(seed)) for seed in range(9)}) > 1
    assert set(drawn(0, each=1)) < set(drawn(0)), "more of them contain fewer"
    with pytest.raises(DataError, match="task 't', calibration split: class 1 has fewer samples than shots"):
        drawn(0, each=3)


def test_another_of_its_class_is_drawn_in_place_of_one_that_cannot_be_used():
    first = drawn(0)[0]
    assert drawn(0, lambda number: True) == drawn(0)
    assert drawn(0, lambda number: number != first) == [drawn(0)[1], *({0, 3, 7} - set(drawn(0)[:2])), *drawn(0)[2:]]


def test_a_label_that_is_no_class_is_refused():
    with pytest.raises(DataError, match="none of the classes"):
        draw_shots(ROWS, LabelPlace("t", "calibration", ("a", "b")), 1, 0)
