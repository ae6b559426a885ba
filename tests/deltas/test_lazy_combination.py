"""Combinations: the way back of a sum without its values, and the values when they are asked for."""

from __future__ import annotations

import pytest
import torch

from adamerge.deltas.groups import Chunks
from adamerge.deltas.lazy_combination import Outline
from deltas.test_base import SHAPE, storages


@pytest.mark.parametrize("kind", ["dense", "streamed"])
def test_an_outline_has_the_gradient_and_no_values(kind):
    deltas = storages(torch.randn(SHAPE), [torch.randn(SHAPE) for _ in range(3)])[kind]
    coefficients, slope = torch.randn(3, 7, requires_grad=True), torch.randn(SHAPE)
    outline = Outline(deltas).combine(coefficients, Chunks(7))
    assert outline.shape == SHAPE and outline.untyped_storage().nbytes() == 4
    wanted = torch.autograd.grad(deltas.combine(coefficients, Chunks(7)), coefficients, slope)
    assert torch.equal(torch.autograd.grad(outline, coefficients, slope)[0], wanted[0])


@pytest.mark.parametrize("kind", ["dense", "streamed"])
@pytest.mark.parametrize("size", [None, 1, 5])
def test_its_values_come_in_parts_of_the_asked_size_without_autograd(kind, size):
    deltas = storages(torch.randn(SHAPE), [torch.randn(SHAPE) for _ in range(3)])[kind]
    coefficients, outline = torch.randn(3, 7, requires_grad=True), Outline(deltas)
    parts = list(outline.combination(outline.combine(coefficients, Chunks(7))).values(size))
    assert len(parts) == (1 if size is None else -(-SHAPE.numel() // size))
    assert not any(values.requires_grad for _, values in parts)
    wanted = deltas.combine(coefficients, Chunks(7)).detach().reshape(-1)
    assert torch.equal(torch.cat([values for _, values in parts]), wanted)
    assert all(torch.equal(wanted[part], values) for part, values in parts)


def test_what_was_done_with_a_combination_is_none():
    outline = Outline(storages(torch.randn(SHAPE), [torch.randn(SHAPE)])["dense"])
    assert outline.combination(torch.zeros(SHAPE)) is None
    assert outline.combination(2 * outline.combine(torch.randn(1, 7), Chunks(7))) is None
