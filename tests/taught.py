"""A language model that remembers whom it taught, and fits of it, for the tests of teachers."""

from functools import partial

import torch
from modules import descending
from torch.optim import SGD
from toys import ToyLanguage, ToyTexts, toy_vectors

from adamerge import LayerWise
from adamerge.objectives import LogitAlignment
from adamerge.training import TeacherFiles


class Counting(ToyLanguage):
    """Remembers for which filling each sample was run without a gradient: nothing else does that in a fit."""

    def __init__(self):
        super().__init__()
        self.taught = []

    def encode(self, inputs, hidden=()):
        if not torch.is_grad_enabled():
            bias = float(self.network.blocks[0].bias[0])
            self.taught += [(bias, tuple(row.tolist())) for row in inputs["tokens"]]
        return super().encode(inputs, hidden)


def module_of(teachers=None, objective=None, backbone=None, tasks=("one", "two"), **arguments):
    arguments = {"hold": False, **arguments}  # where forward passes are counted
    return descending(
        backbone or Counting(), toy_vectors(tasks), partial(LayerWise, init=0.3), objective or LogitAlignment(),
        0.1, partial(SGD, lr=1.0), teachers=teachers, **arguments,
    )  # fmt: skip


def w(module):
    return module.merged.parametrization.w.detach()


def other_expert(tmp_path):
    module = module_of(TeacherFiles(folder=tmp_path))
    expert = module.merged.task_vectors.checkpoints["one"]
    moved = {name: expert[name] * 1.01 for name in expert}
    from adamerge.checkpoints.opening import open_checkpoint

    module.merged.task_vectors.checkpoints["one"] = open_checkpoint(moved)
    return module, ToyTexts()
