"""A transform of one's own needs one method; its state is empty unless it prepares one."""

import pytest
import torch

from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import Elementwise


class Halved(Elementwise):
    def apply(self, name, deltas, state):
        assert state == {} and deltas.shape == (2, 3) and deltas.dtype == torch.float32
        return deltas / 2


def test_one_method_is_enough():
    experts = {"one": {"a": torch.ones(3)}, "two": {"a": 2 * torch.ones(3)}}
    vectors = TaskVectors({"a": torch.zeros(3)}, experts, [Halved()])
    assert vectors.states == [{}]
    assert vectors["a"].dense().tolist() == [[0.5] * 3, [1.0] * 3]


def test_without_it_there_is_no_transform():
    class Nothing(Elementwise):
        pass

    with pytest.raises(TypeError, match="apply"):
        Nothing()
