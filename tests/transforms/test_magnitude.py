"""Magnitude pruning: by hand, ties included; only matrices; factors stay where nothing is pruned."""

import pytest
import torch

from adamerge.errors import ConfigError
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import Magnitude


def pruned(keep, *rows, shape=(2, 3), name="w"):
    base = {name: torch.zeros(shape)}
    experts = {f"e{k}": {name: torch.tensor(row, dtype=torch.float32).view(shape)} for k, row in enumerate(rows)}
    return TaskVectors(base, experts, [Magnitude(keep)])[name].dense().flatten(1).tolist()


def test_each_expert_keeps_its_own_largest_by_hand():
    assert pruned(0.5, [1, -6, 2, 5, -3, 4], [9, 8, 7, 1, 2, 3]) == [[0, -6, 0, 5, 0, 4], [9, 8, 7, 0, 0, 0]]
    # floor(0.4 * 6) = 2
    assert pruned(0.4, [1, -6, 2, 5, -3, 4]) == [[0, -6, 0, 5, 0, 0]]


def test_equal_magnitudes_at_the_threshold_go_together():
    assert pruned(0.5, [1, 2, -2, 2, 3, 4]) == [[0, 0, 0, 0, 3, 4]]


def test_keeping_all_is_no_change_and_less_than_one_entry_is_none():
    row = [1.0, -6.0, 2.0, 5.0, -3.0, 4.0]
    assert pruned(1.0, row) == [row]
    assert pruned(0.1, row) == [[0.0] * 6]


@pytest.mark.parametrize("shape", [(6,), (1, 2, 3), (1, 1, 2, 3)])
def test_what_is_no_matrix_stays(shape):
    row = [1.0, -6.0, 2.0, 5.0, -3.0, 4.0]
    assert pruned(0.2, row, shape=shape) == [row]


@pytest.mark.parametrize("keep", [0, -0.1, 1.1, float("nan")])
def test_impossible_fractions_are_refused(keep):
    with pytest.raises(ConfigError, match="keep"):
        Magnitude(keep)
