"""Frozen: the same updates and file as what it wraps, and no gradient."""

from functools import partial

import torch

from adamerge.coefficients import Coefficients, load_coefficients, save_coefficients
from adamerge.merging import updates
from adamerge.parametrizations import Concrete, Frozen, LayerWise
from adamerge.task_vectors import TaskVectors

from .test_concrete import given


def test_updates_values_and_coefficients_are_those_inside(tmp_path):
    vectors = TaskVectors(**given(tmp_path))
    plain, frozen = LayerWise(vectors, 0.4), Frozen(vectors, partial(LayerWise, init=0.4))
    assert frozen.initial == plain.initial and frozen.values().keys() == plain.values().keys()
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    values = {name: torch.rand(value.shape) for name, value in plain.values().items()}
    plain.load_values(values)
    frozen.load_values(values)
    for name in vectors:
        update = frozen(name, vectors[name])
        assert torch.equal(update, plain(name, vectors[name])) and not update.requires_grad
        assert torch.equal(frozen.draw(3)(name, vectors[name]), update)
        assert torch.equal(torch.cat([part for _, part in updates(frozen, name, vectors[name])]), update.flatten())
    save_coefficients(Coefficients(vectors, frozen), tmp_path / "c.safetensors")
    loaded = load_coefficients(tmp_path / "c.safetensors").parametrization
    assert isinstance(loaded, Frozen) and isinstance(loaded.inner, LayerWise)
    assert all(torch.equal(value, values[name]) for name, value in loaded.values().items())


def test_a_frozen_mask_is_still_written():
    base = {"a": torch.zeros(3)}
    vectors = TaskVectors(base, {"one": {"a": torch.ones(3)}})
    frozen = Frozen(vectors, partial(Concrete, inner=LayerWise))
    assert frozen.masks().keys() == {"a"} and not frozen.masks()["a"].requires_grad
