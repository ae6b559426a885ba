"""A backbone of one's own: heads per task, and what it must have."""

import pytest
import torch
from torch import nn

from adamerge.backbones import Backbone, Encoded, Output
from adamerge.io.model_folder import Layout


class Plain(Backbone):
    def __init__(self):
        self.network = nn.Linear(2, 2)
        self.heads = {"one": nn.Linear(2, 3), "two": nn.Linear(2, 5)}

    def tensors(self):
        return self.network.state_dict(keep_vars=True)

    def build_heads(self, tasks, experts):
        return

    def layout(self):
        return Layout()

    def preprocess(self, sample):
        return sample

    def encode(self, inputs, hidden=()):
        return Encoded(self.network(inputs))


def test_each_task_has_its_head_and_keeps_the_features():
    backbone, features = Plain(), torch.randn(4, 2)
    for task, classes in (("one", 3), ("two", 5)):
        output = backbone.output(Encoded(features), task)
        assert isinstance(output, Output) and output.logits.shape == (4, classes) and output.features is features
        assert torch.equal(output.logits, backbone.heads[task](features))
    with pytest.raises(KeyError):
        backbone.output(Encoded(features), "three")


def test_moving_takes_all_heads_along():
    backbone = Plain()
    backbone.move_heads(torch.device("meta"))
    assert all(head.weight.is_meta for head in backbone.heads.values())


def test_every_abstract_method_is_needed():
    for name in ("tensors", "build_heads", "layout", "preprocess", "encode"):
        assert name in Backbone.__abstractmethods__
