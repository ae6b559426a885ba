"""The way back: gradients of several tensors, at once or handed on one by one, to hand-computed ones of the coefficients."""

from __future__ import annotations

import pytest
import torch
from deltas.test_base import SHAPE, storages
from torch import nn

from adamerge.deltas.groups import Chunks
from adamerge.deltas.lazy_combination import Outline
from adamerge.merging.copies import Place
from adamerge.merging.pullback import WayBack

DELTAS = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3.0], [5.0]])}


@pytest.fixture
def kept():
    """Two tensors ``c * delta`` with gradients 1 and 10, and a third coefficient that nothing uses."""
    c, unused = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.zeros(2))
    way, places = WayBack([c, unused]), {}
    for (name, delta), gradient in zip(DELTAS.items(), (1.0, 10.0), strict=True):
        way.keep(name, (c * delta).reshape(-1))
        parameter = nn.Parameter(delta.clone())
        parameter.grad = torch.full_like(delta, gradient)
        places[name] = Place(parameter)
    return way, places, c


def test_all_at_once(kept):
    way, places, _ = kept
    found, none = way.gradients(places)
    assert found.item() == 1 + 2 + 30 + 50 and none.tolist() == [0, 0]


def test_what_was_handed_on_counts_once(kept):
    way, places, _ = kept
    way.hand_on({"b": places["b"]})
    places["b"].tensor.grad = None  # a block's weights go, and their gradient
    assert way.gradients({"a": places["a"]})[0].item() == 83


def test_a_block_that_runs_again_is_kept_again_and_added(kept):
    way, places, c = kept
    way.hand_on({"b": places["b"]})
    way.keep("b", (c * DELTAS["b"]).reshape(-1))
    assert way.gradients(places)[0].item() == 83 + 80


def test_a_tensor_that_the_loss_did_not_reach_and_one_without_coefficients_count_nothing(kept):
    way, places, _ = kept
    places["a"].tensor.grad = None
    fixed = nn.Parameter(torch.zeros(2))
    fixed.grad = torch.ones(2)
    way.keep("fixed", torch.ones(2))
    assert way.gradients({**places, "fixed": Place(fixed)})[0].item() == 80


@pytest.mark.parametrize("leaf", [True, False])
def test_a_combination_has_the_values_and_the_gradient_of_what_was_combined(leaf):
    deltas = storages(torch.randn(SHAPE), [torch.randn(SHAPE) for _ in range(3)])["dense"]
    w = nn.Parameter(torch.randn(3, 7))
    outline = Outline(deltas)
    update = outline.combine(w if leaf else 2 * w, Chunks(7))
    combination = outline.combination(update)
    whole = deltas.combine(w if leaf else 2 * w, Chunks(7))
    assert torch.equal(torch.cat([values for _, values in combination.values()]), whole.detach().reshape(-1))
    parameter = nn.Parameter(torch.zeros(SHAPE))
    parameter.grad = torch.randn(SHAPE)
    way = WayBack([w])
    way.keep("a", combination)
    wanted = torch.autograd.grad(whole, w, parameter.grad)[0]
    assert torch.equal(way.gradients({"a": Place(parameter)})[0], wanted)


def test_a_combination_with_constant_coefficients_counts_nothing():
    outline = Outline(storages(torch.randn(SHAPE), [torch.randn(SHAPE)])["dense"])
    way, parameter = WayBack([nn.Parameter(torch.zeros(2))]), nn.Parameter(torch.zeros(SHAPE))
    way.keep("a", outline.combination(outline.combine(torch.randn(1, 7), Chunks(7))))
    parameter.grad = torch.ones(SHAPE)
    assert way.gradients({"a": Place(parameter)})[0].tolist() == [0, 0]
