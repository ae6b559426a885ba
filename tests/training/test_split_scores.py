"""Scores of a split: the mean over a task's samples, however they are batched, and the plain mean over tasks."""

from types import SimpleNamespace

import pytest
import torch

from adamerge.backbones import Batch, Encoded, Output
from adamerge.data.batch_order import labelled_batch
from adamerge.data.metrics import Accuracy
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


def test_texts_of_like_length_run_together_where_lightning_records_nothing():
    ran = []

    class Merged:
        """Predicts whether a text has an odd number of tokens."""

        device, copy = torch.device("cpu"), SimpleNamespace(whole=True)
        backbone = SimpleNamespace(output=lambda encoded, task: Output(encoded.features, encoded))

        def merge(self):
            return

        def __call__(self, inputs):
            ran.append((inputs["attention_mask"].shape[1], torch.is_inference_mode_enabled()))
            odd = inputs["attention_mask"].sum(dim=1) % 2
            return Encoded(torch.stack([1 - odd, odd], dim=1).float())

    sizes = [3, 90, 4, 81]
    texts = [{"input_ids": torch.ones(size, dtype=torch.long), "attention_mask": torch.ones(size)} for size in sizes]
    data = SimpleNamespace(labelled_tasks=lambda split: ["a"], metric=Accuracy())
    scores, logs = SplitScores(Merged()), Logs()
    scores.begin(data, "validation")
    with torch.inference_mode():
        scores.update(labelled_batch([(text, torch.tensor(1)) for text in texts]), 0)
    scores.log(logs)
    assert logs.values["validation/accuracy/a"] == 0.5 and sorted(ran) == [(4, False), (90, False)]
