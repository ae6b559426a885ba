"""A wrapper: what it hands on is its inner parametrization's, whatever that is."""

from functools import partial

import torch

from adamerge.parametrizations import Concrete, Frozen, LayerWise, RandomPartition
from adamerge.parametrizations.constraints import Projection
from adamerge.parametrizations.wrapper import Wrapper
from adamerge.task_vectors.task_vectors import TaskVectors


class Doubled(Wrapper):
    """Twice the update."""

    def forward(self, name, deltas):
        return 2 * self.inner(name, deltas)


def vectors():
    base = {"a": torch.zeros(6), "b": torch.zeros(4)}
    return TaskVectors(base, {task: {n: torch.randn(v.shape) for n, v in base.items()} for task in ("one", "two")})


def test_everything_but_the_update_is_the_inner_ones():
    given = vectors()
    wrapped = Doubled(given, partial(RandomPartition, parts=3, init=0.25))
    inner = wrapped.inner
    assert wrapped.initial == 0.25 and wrapped.index_bytes == inner.index_bytes == 10
    assert wrapped.transient_per_element == inner.transient_per_element > 0
    assert wrapped.values().keys() == inner.values().keys() == {"a", "b"}
    assert all(torch.equal(value, inner.coefficients()[group]) for group, value in wrapped.coefficients().items())
    assert torch.equal(wrapped("a", given["a"]), 2 * inner("a", given["a"]))
    assert wrapped.linear("a") is None  # it has a formula of its own
    assert list(wrapped.parameters()) == list(inner.parameters())


def test_masks_and_projections_reach_the_inner_one():
    given = vectors()
    masked = Doubled(given, partial(Concrete, inner=partial(LayerWise, constraint=Projection())))
    assert masked.masks().keys() == {"a", "b"} and masked.masks()["a"] is masked.inner.masks()["a"]
    masked.load_values({group: torch.full_like(value, 3.0) for group, value in masked.values().items()})
    masked.project_()
    assert {float(value.max()) for value in masked.values().values()} == {1.0}


def test_frozen_values_are_not_projected():
    frozen = Frozen(vectors(), partial(LayerWise, constraint=Projection()))
    frozen.load_values({group: torch.full_like(value, 3.0) for group, value in frozen.values().items()})
    frozen.project_()
    assert {float(value.min()) for value in frozen.values().values()} == {3.0}
