"""Scores of a split: the mean over a task's samples, however they are batched, and the plain mean over tasks."""

from types import SimpleNamespace

import pytest
import torch

from adamerge.backbones import Batch, Encoded
from adamerge.training.split_scores import SplitScores


class Logs:
    """What is logged, and how."""

    def __init__(self):
        self.values, self.synced = {}, set()

    def log(self, name, value, prog_bar=False, sync_dist=False):
        self.values[name] = float(value)
        self.synced.add(sync_dist)

    def log_dict(self, values, sync_dist=False):
        for name, value in values.items():
            self.log(name, value, sync_dist=sync_dist)


def test_each_task_counts_the_same_however_many_samples_it_has():
    merges = []

    class Merged:
        """Whose output is its input."""

        device, backbone = "cpu", SimpleNamespace(output=lambda encoded, task: encoded.features)

        def merge(self):
            merges.append(torch.is_grad_enabled())

        def __call__(self, inputs):
            return Encoded(inputs)

    class Equal:
        name = "accuracy"

        def __call__(self, output, labels):
            return (output == labels).float()

    tasks = {"validation": ["a", "b"], "test": ["b"]}
    data = SimpleNamespace(labelled_tasks=tasks.__getitem__, metric=Equal())
    scores, one = SplitScores(Merged()), torch.ones
    scores.begin(data, "validation")
    scores.update(Batch(one(3), labels=one(3)), 0)
    scores.update(Batch(one(1), labels=torch.zeros(1)), 0)
    scores.update(Batch(one(2), labels=torch.tensor([1.0, 0.0])), 1)
    logs = Logs()
    scores.log(logs)
    assert merges == [False] and logs.synced == {True}
    assert logs.values == pytest.approx(
        {"validation/accuracy/a": 0.75, "validation/accuracy/b": 0.5, "validation/accuracy": 0.625}
    )
    scores.begin(data, "test")
    scores.update(Batch(one(1), labels=one(1)), 0)
    logs = Logs()
    scores.log(logs)
    assert logs.values == {"test/accuracy/b": 1.0, "test/accuracy": 1.0} and len(merges) == 2
