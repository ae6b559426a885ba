"""Frozen: the same updates and file as what it wraps, and no gradient."""

from functools import partial

import torch

from adamerge.artifacts.coefficients import Coefficients, load_coefficients, save_coefficients
from adamerge.merging.merged_tensor import updates
from adamerge.parametrizations import Concrete, Frozen, LayerWise, RandomPartition
from adamerge.task_vectors.task_vectors import TaskVectors

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


def test_a_search_sees_the_declared_mask_of_what_is_frozen():
    """The samples that a search of the mask itself would see are others."""
    vectors = TaskVectors({"a": torch.zeros(30)}, {"one": {"a": torch.ones(30)}})
    frozen = Frozen(vectors, partial(Concrete, inner=LayerWise))
    declared = frozen("a", vectors["a"])
    assert torch.equal(frozen.draw(3)("a", vectors["a"]), declared)
    assert not torch.equal(frozen.inner.draw(3)("a", vectors["a"]), declared)


def test_what_contractions_keep_is_kept_of_what_is_frozen_too():
    vectors = TaskVectors({"a": torch.zeros(30)}, {"one": {"a": torch.ones(30)}})
    frozen = Frozen(vectors, partial(RandomPartition, parts=3))
    assert frozen.index_bytes == RandomPartition(vectors, parts=3).index_bytes == 30, "a byte an element"
    assert frozen.transient_per_element == frozen.inner.transient_per_element > 0
