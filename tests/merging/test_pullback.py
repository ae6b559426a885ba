"""The pullback: gradients of several tensors, at once or handed on one by one, to hand-computed ones of the coefficients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from deltas.test_base import SHAPE, storages
from torch import nn

from adamerge.deltas.groups import Chunks
from adamerge.merging.copies import Place
from adamerge.merging.pullback import MergeGradients

DELTAS = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0], [5.0]])}


def flat(gradient):
    return gradient.reshape(-1)


@pytest.fixture
def noted():
    """Two tensors ``c * delta`` with gradients 1 and 10, and a third coefficient that nothing uses."""
    c, unused = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.zeros(2))
    pulled, places = MergeGradients([c, unused]), {}
    for (name, delta), gradient in zip(DELTAS.items(), (1.0, 10.0), strict=True):
        pulled.note(name, (c * delta).reshape(-1), flat)
        parameter = nn.Parameter(delta.clone())
        parameter.grad = torch.full_like(delta, gradient)
        places[name] = Place(parameter)
    return pulled, places, c


def test_all_at_once(noted):
    pulled, places, _ = noted
    found, none = pulled.gradients(places)
    assert found.item() == 1 + 2 + 30 + 50 and none.tolist() == [0, 0]


def test_what_was_handed_on_counts_once(noted):
    pulled, places, _ = noted
    pulled.hand_on({"b": places["b"]})
    places["b"].tensor.grad = None  # a block's weights go, and their gradient
    assert pulled.gradients({"a": places["a"]})[0].item() == 83


def test_a_block_that_runs_again_is_kept_again_and_added(noted):
    pulled, places, c = noted
    pulled.hand_on({"b": places["b"]})
    pulled.note("b", (c * DELTAS["b"]).reshape(-1), flat)
    assert pulled.gradients(places)[0].item() == 83 + 80


def test_a_tensor_that_the_loss_did_not_reach_and_one_without_coefficients_count_nothing(noted):
    pulled, places, _ = noted
    places["a"].tensor.grad = None
    fixed = nn.Parameter(torch.zeros(2))
    fixed.grad = torch.ones(2)
    pulled.note("fixed", torch.ones(2), flat)
    assert pulled.gradients({**places, "fixed": Place(fixed)})[0].item() == 80


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("part", [None, slice(13, 41)])
def test_a_contraction_of_a_linear_update_has_the_gradient_of_its_sum(leaf, part):
    deltas = storages(torch.randn(SHAPE), [torch.randn(SHAPE) for _ in range(3)])["dense"]
    w = nn.Parameter(torch.randn(3, 7))
    whole = deltas.combine(w if leaf else 2 * w, Chunks(7)).reshape(-1)[part or slice(None)]
    parameter = nn.Parameter(torch.zeros(len(whole)))
    parameter.grad = torch.randn(len(whole))
    pulled = MergeGradients([w])
    pulled.note("a", w if leaf else 2 * w, partial(deltas.contract, groups=Chunks(7), part=part))
    wanted = torch.autograd.grad(whole, w, parameter.grad)[0]
    assert torch.allclose(pulled.gradients({"a": Place(parameter)})[0], wanted, atol=1e-6)


def test_constant_coefficients_count_nothing():
    deltas = storages(torch.randn(SHAPE), [torch.randn(SHAPE)])["dense"]
    pulled, parameter = MergeGradients([nn.Parameter(torch.zeros(2))]), nn.Parameter(torch.zeros(SHAPE))
    pulled.note("a", torch.randn(1, 7), partial(deltas.contract, groups=Chunks(7)))
    parameter.grad = torch.ones(SHAPE)
    assert pulled.gradients({"a": Place(parameter)})[0].tolist() == [0, 0]
