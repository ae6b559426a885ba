"""Shortcuts: settled blocks do not run again, and what comes behind them sees the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_points import INPUTS, TASKS, ToyPoints
from toy_residual import ToyResidual

from adamerge.backbones import Encoded
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.block_shortcuts import Shortcuts
from adamerge.training.solver_inputs import SampledInputs


class Block(nn.Module):
    """Counts how often it runs; hands on a tuple, and writes into what it is given."""

    def __init__(self):
        super().__init__()
        self.map, self.runs = nn.Linear(INPUTS, INPUTS), 0

    def forward(self, x, scale=1.0):
        self.runs += 1
        y = torch.tanh(self.map(x))
        x += scale * y
        return x, "something else"


class Chain(nn.Module):
    def __init__(self, skipping=False):
        super().__init__()
        self.first, self.second = (nn.ModuleList([Block() for _ in range(2)]) for _ in range(2))
        self.last, self.skipping = nn.Linear(INPUTS, 3), skipping

    def forward(self, x):
        x, states = x.clone(), []
        for block in self.first:
            x, _ = block(x)
            states.append(x.clone())
        x = x.flip(-1) + (states[0] if self.skipping else 0)
        for block in self.second:
            x, _ = block(x, scale=0.5)
        return self.last(x)

    @property
    def blocks(self):
        return [*self.first, *self.second]


def test_settled_blocks_run_once_and_change_no_bit():
    torch.manual_seed(0)
    network, x = Chain(), torch.randn(5, INPUTS)
    expected, shortcuts = network(x), Shortcuts(network)
    forwards = [block.forward for block in network.blocks]
    with shortcuts.passing("a", lambda: network.blocks[2].runs > 1):  # what may change is in the third
        assert torch.equal(network(x), expected)
    assert [block.runs for block in network.blocks] == [2, 2, 2, 2]
    with shortcuts.passing("a", lambda: network.blocks[3].runs > 2):
        assert torch.equal(network(x), expected)
    assert [block.runs for block in network.blocks] == [2, 2, 3, 3]
    with shortcuts.passing("a", lambda: False):
        assert torch.equal(network(x), expected)
    with shortcuts.passing("a", lambda: False):
        assert torch.equal(network(x), expected)
    assert [block.runs for block in network.blocks] == [2, 2, 3, 4]
    with shortcuts.passing("b", lambda: False):  # of another model or batch nothing is known
        network(2 * x)
    shortcuts.forget()
    with shortcuts.passing("a", lambda: False):
        network(x)
    assert [block.runs for block in network.blocks] == [4, 4, 5, 6]
    assert [block.forward for block in network.blocks] == forwards and "forward" not in vars(network.blocks[0])


def test_an_error_leaves_the_network_as_it_was():
    network = Chain()
    with pytest.raises(ZeroDivisionError), Shortcuts(network).passing("a", lambda: False):
        _ = 1 / 0
    assert "forward" not in vars(network.blocks[0])


class Blocks(ToyResidual):
    def __init__(self, skipping=False):
        super().__init__()
        self.network = Chain(skipping)

    def encode(self, inputs, hidden=()):
        return Encoded(self.network(inputs))


def inputs_of(skipping):
    torch.manual_seed(0)
    backbone, data = Blocks(skipping), ToyPoints(eval_batch_size=8)
    base = {name: torch.randn(value.shape) for name, value in backbone.tensors().items()}
    experts = {task: {name: value + 0.1 * torch.randn(value.shape) for name, value in base.items()} for task in TASKS}
    data.serve(backbone)
    return SampledInputs(backbone, TaskVectors(base, experts), data, samples=20, device=torch.device("cpu"))


def entered(inputs, groups):
    found = []
    for group in groups:
        for task in TASKS:
            found += [one.inputs for one in (*inputs.of_expert(group, task), *inputs.of_merge(group, task))]
    return found


@pytest.mark.parametrize("skipping", [False, True])
def test_what_a_solver_sees_is_that_of_whole_passes(skipping):
    """Where a later block sees what an earlier one made, all of the network runs each time."""
    inputs, plain = inputs_of(skipping), inputs_of(skipping)
    groups = inputs.groups
    assert len(groups) == 5 and (inputs._shortcuts is None) == skipping
    plain._shortcuts = None
    blocks = inputs.merged.backbone.network.blocks
    before = [block.runs for block in blocks]
    found = entered(inputs, groups)
    ran = [block.runs - own for block, own in zip(blocks, before, strict=True)]
    expected = entered(plain, groups)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    batches = 2 * 3 * len(TASKS)  # of 20 samples by 8, through expert and merge
    # a block runs for its own map, where its pass ends, and once more to be settled
    assert ran == ([5 * batches, 4 * batches, 3 * batches, 2 * batches] if skipping else [2 * batches] * 4)
    again = entered(inputs, groups[:2])  # an earlier map, asked for again
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=False))
