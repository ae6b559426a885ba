"""The backward pass: micro-batches and padding change nothing, weights may be negative, prepare comes first."""

from types import SimpleNamespace

import pytest
import torch
from rounding import gamma
from torch import nn

from adamerge.backbones import Backbone, Batch, Encoded, Output
from adamerge.errors import ConfigError
from adamerge.io.model_folder import Layout
from adamerge.merging.merged_model import MergedModel
from adamerge.objectives import Entropy, Objective
from adamerge.parametrizations import LayerWise
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.objective_gradient import BatchObjective

ALONE = SimpleNamespace(reduce=lambda totals, reduce_op: totals, world_size=1)


class Words(Backbone):
    """One prediction per position."""

    def __init__(self):
        self.network = nn.Embedding(11, 5)
        self.heads = {}

    def tensors(self):
        return self.network.state_dict(keep_vars=True)

    def build_heads(self, tasks, experts):
        return

    def layout(self):
        return Layout()

    def preprocess(self, sample):
        return sample

    def encode(self, inputs, hidden=()):
        features = self.network(inputs["input_ids"])
        return Encoded(features, mask=inputs["attention_mask"].bool())

    def output(self, encoded, task):
        return Output(encoded.features * (2 if task == "b" else 1), encoded)


def merged():
    torch.manual_seed(0)
    base = {"weight": torch.randn(11, 5)}
    vectors = TaskVectors(base, {"a": {"weight": torch.randn(11, 5)}, "b": {"weight": torch.randn(11, 5)}})
    return MergedModel(Words(), vectors, LayerWise(vectors))


def batch():
    def part(samples, length):
        ids = torch.randint(1, 11, (samples, length))
        mask = torch.ones(samples, length, dtype=torch.long)
        mask[0, -1] = 0
        return Batch({"input_ids": ids * mask, "attention_mask": mask})

    torch.manual_seed(1)
    return {"a": part(3, 4), "b": part(2, 7)}


def gradient(micro_batch, objective=None, **weights):
    model = merged()
    model.merge()
    losses = BatchObjective(model, objective or Entropy(), weights, micro_batch, ALONE).backward(batch()).losses
    model.pull_back(torch.stack(list(losses.values())).sum()).backward()
    return losses, model.parametrization.w.grad


def test_micro_batches_and_padding_change_nothing():
    losses, expected = gradient(None)
    for size in (1, 2, 4):
        again, found = gradient(size)
        # sums over five classes, up to seven positions and five samples, there and back, and over 55 weights
        bound = 2 * gamma(2 * (5 + 7 + 5) + 55)
        assert (found - expected).abs().max() <= bound * expected.abs().max()
        assert all(torch.allclose(again[task], losses[task], rtol=bound) for task in losses)


def test_the_loss_is_the_sum_over_tasks_of_means_over_samples_of_means_over_positions():
    model = merged()
    model.merge()
    losses, _ = gradient(None)
    table = next(iter(model.backbone.tensors().values())).detach().double()
    for task, part in batch().items():
        found = []
        for ids, mask in zip(part.inputs["input_ids"], part.inputs["attention_mask"], strict=True):
            p = ((2 if task == "b" else 1) * table[ids[mask.bool()]]).softmax(-1)
            found.append(-(p * p.log()).sum(-1).mean())
        assert float(losses[task]) == pytest.approx(float(sum(found) / len(found)), rel=1e-6)


def test_a_negative_weight_moves_away():
    _, both = gradient(None)
    _, only_a = gradient(None, b=0.0)
    _, away = gradient(None, b=-1.0)
    assert torch.allclose(away, 2 * only_a - both, atol=1e-6)


def test_prepare_sees_predictions_of_this_merge_before_any_gradient():
    class Looks(Entropy):
        def prepare(self, task, batch, predict):
            output = predict(batch.inputs)
            assert not output.logits.requires_grad and output.logits.shape[:2] == batch.inputs["input_ids"].shape
            seen[task] = output.mean(output.logits.max(-1).values)
            return batch._replace(inputs={name: value[:1] for name, value in batch.inputs.items()})

    seen = {}
    losses, found = gradient(2, Looks())
    assert seen.keys() == {"a", "b"} and len(seen["a"]) == 3
    whole, _ = gradient(None)
    assert not torch.equal(losses["a"], whole["a"]) and torch.isfinite(found).all()


def test_one_loss_per_sample_is_asked_for():
    class Mean(Objective):
        def forward(self, output, batch):
            return output.logits.mean()

    with pytest.raises(ConfigError, match="Mean must return one loss per sample"):
        gradient(None, Mean())
