"""Frozen coefficients: another parametrization's stay what they are while something around it is learned."""

from __future__ import annotations

from torch import Tensor

from adamerge.deltas.base import Deltas
from adamerge.deltas.groups import Groups
from adamerge.parametrizations.base import ParametrizationFactory
from adamerge.parametrizations.wrapper import Wrapper
from adamerge.task_vectors.task_vectors import TaskVectors


class Frozen(Wrapper):
    """Makes the same updates, coefficients and file as ``inner``; no gradient reaches its parameters.

    A mask inside is constant, so that a search sees the declared one, too.

    ``Concrete(inner=partial(Frozen, inner=TaskWise))`` is Concrete task arithmetic.

    Args:
        task_vectors: handed on.
        inner: what stays constant.
    """

    def __init__(self, task_vectors: TaskVectors, inner: ParametrizationFactory) -> None:
        super().__init__(task_vectors, inner)
        self.inner.requires_grad_(False)

    def forward(self, name: str, deltas: Deltas) -> Tensor:
        """Returns the update of ``inner``."""
        update: Tensor = self.inner(name, deltas)
        return update

    def linear(self, name: str) -> tuple[Tensor, Groups] | None:
        """Returns the constant coefficients of ``inner`` where its update is linear."""
        return self.inner.linear(name)

    def project_(self) -> None:
        """Leaves the raw values as they are: no optimiser moves them."""
        return
