"""Linear maps of a network: found however it multiplies, in the order in which it runs, with what their outputs go into."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from adamerge.backbones.linears import LinearMap, Recording


class Mixed(nn.Module):
    """Every way to multiply by a matrix, and sums that are none of a stream's."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Parameter(torch.randn(6, 4))  # registered first, used last
        self.one = nn.Linear(6, 6)
        self.twice = nn.Linear(6, 6)
        self.keys, self.values = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.stored = nn.Parameter(torch.randn(6, 6))
        self.stored_bias = nn.Parameter(torch.randn(6))
        self.plain = nn.Parameter(torch.randn(6, 6))
        self.strange = nn.Parameter(torch.randn(6, 6))
        self.conv = nn.Conv1d(3, 3, 1)
        self.table = nn.Embedding(5, 6)
        self.out = nn.Linear(6, 6)

    def forward(self, ids):
        x = self.table(ids) + 1
        y = self.one(x)
        y = y + 0.04 * torch.pow(y, 3)  # as in gelu: what is added was made of the output
        x = x + functional.dropout(self.twice(self.twice(y)), 0.5, training=False)
        both = self.keys(x) * self.values(x)
        x = x + torch.addmm(self.stored_bias, both.view(-1, 6), self.stored).view(both.shape)
        x += torch.matmul(x, self.plain)
        x = x + functional.linear(x, self.strange, torch.zeros(6))
        x = self.conv(x)
        x = functional.relu(self.out(x))
        return x[:, 0] @ self.last


def test_maps_are_found_in_the_order_in_which_they_run():
    torch.manual_seed(0)
    network, ids = Mixed().eval(), torch.tensor([[0, 3, 1], [2, 2, 4]])
    expected = network(ids)
    with Recording(dict(network.named_parameters())) as recording:
        found = network(ids)
    assert torch.equal(found, expected), "looking changes no bit"
    assert recording.groups() == [
        (LinearMap("one.weight", "one.bias"),),
        (LinearMap("keys.weight", "keys.bias"), LinearMap("values.weight")),
        (LinearMap("stored", "stored_bias", transposed=True, streams=True),),
        (LinearMap("plain", None, transposed=True, streams=True),),
        (LinearMap("out.weight", "out.bias"),),
        (LinearMap("last", None, transposed=True),),
    ]


def test_weights_may_be_stored_the_other_way_round():
    layer = nn.Linear(4, 3, bias=False)
    with Recording({"turned": layer.weight.mT}) as recording:
        layer(torch.ones(2, 4))
    assert recording.groups() == [(LinearMap("turned", None, transposed=True),)]


class Block(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x):
        normed = self.norm(x)
        return x + self.attention(normed, normed, normed, need_weights=False)[0]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (1, 3), (3, 1)])
def test_inside_of_attention(shape, batch_first):
    """What enters its last map is softmax(Q K^T / sqrt(d)) V, from the formula in float64."""
    torch.manual_seed(0)
    block, x = Block(batch_first).eval(), torch.randn(*shape, 8)  # (samples, positions, width)
    nn.init.normal_(block.attention.in_proj_bias)
    nn.init.normal_(block.attention.out_proj.bias)
    given = x if batch_first else x.transpose(0, 1)
    with torch.no_grad():
        expected = block(given)
        with Recording(dict(block.named_parameters())) as recording:
            found = block(given)
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)  # without gradients torch's own takes another kernel
    first, last = recording.uses
    assert recording.groups() == [
        (LinearMap("attention.in_proj_weight", "attention.in_proj_bias"),),
        (LinearMap("attention.out_proj.weight", "attention.out_proj.bias", streams=True),),
    ]
    wide = block.double()
    with torch.no_grad():
        normed = wide.norm(x.double())
        q, k, v = (normed @ wide.attention.in_proj_weight.T + wide.attention.in_proj_bias).chunk(3, dim=-1)
        heads = []
        for own in (slice(0, 4), slice(4, 8)):
            scores = q[..., own] @ k[..., own].mT / math.sqrt(4)
            heads.append(scores.softmax(dim=-1) @ v[..., own])
    assert torch.allclose(first.inputs.transpose(0, 1).double(), normed, rtol=0, atol=1e-5)
    assert torch.allclose(last.inputs.transpose(0, 1).double(), torch.cat(heads, dim=-1), rtol=0, atol=1e-5)
    assert first.positions_first and last.positions_first


def test_inputs_that_were_written_into_are_others():
    first, second, third = (nn.Linear(4, 4) for _ in range(3))
    named = {
        f"{n}.{end}": getattr(one, end) for n, one in enumerate((first, second, third)) for end in ("weight", "bias")
    }
    x = torch.ones(2, 4)
    with torch.no_grad(), Recording(named) as recording:
        first(x)
        second(x)
        x += 1
        third(x)
    assert [[one.weight for one in group] for group in recording.groups()] == [["0.weight", "1.weight"], ["2.weight"]]
