"""Hidden states by number, from either end and as a share of the depth; those that are asked for are kept, no others."""

import math

import pytest
import torch
from torch import nn

from adamerge.backbones.hidden_states import captured, state_number
from adamerge.backbones.transformers import chosen
from adamerge.errors import ConfigError


@pytest.mark.parametrize(
    ("number", "expected"), [(0, 0), (12, 12), (-1, 12), (-13, 0), (0.5, 6), (0.25, 3), (0.99, 12), (0.01, 0), (3.0, 3)]
)
def test_twelve_blocks_have_thirteen_states(number, expected):
    assert state_number(number, 13) == expected


@pytest.mark.parametrize("number", [13, -14, 1.5, -0.5, math.inf, math.nan])
def test_others_are_refused(number):
    with pytest.raises(ConfigError, match="there is no hidden state") as raised:
        state_number(number, 13)
    assert raised.value.expected == "0 to 12, -1 to -13, or a share of the depth between 0 and 1"


def test_both_ways_of_a_network_give_the_same_states():
    blocks, inputs = [nn.Linear(3, 3) for _ in range(4)], torch.randn(2, 5, 3)
    states = [inputs]
    for block in blocks:
        states.append(block(states[-1]))
    numbers = [0.5, -1, 0, 1, -1]
    with captured(blocks, numbers) as found:
        nn.Sequential(*blocks)(inputs)
    for own, other, number in zip(found, chosen(states, numbers), [2, 4, 0, 1, 4], strict=True):
        assert torch.equal(own, states[number]) and other is states[number]


def test_only_what_is_asked_for_is_kept():
    blocks = [nn.Linear(3, 3) for _ in range(4)]
    with captured(blocks, [0.5]):
        assert [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in blocks] == [0, 1, 0, 0]
        nn.Sequential(*blocks)(torch.randn(1, 3))
    assert not any(block._forward_hooks for block in blocks)
