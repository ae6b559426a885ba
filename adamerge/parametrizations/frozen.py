"""Frozen: another parametrization whose coefficients stay what they are while something around it is learned."""

from __future__ import annotations

from torch import Tensor, nn

from adamerge.deltas.base import Deltas
from adamerge.parametrizations.base import Parametrization, ParametrizationFactory
from adamerge.task_vectors.task_vectors import TaskVectors


class Frozen(Parametrization):
    """The same updates, coefficients and file as ``inner``; no gradient reaches its parameters.

    A mask inside is constant, so that a search sees the declared one, too.

    ``Concrete(inner=partial(Frozen, inner=TaskWise))`` is Concrete task arithmetic.

    Args:
        task_vectors: handed on.
        inner: what is kept constant.
    """

    def __init__(self, task_vectors: TaskVectors, inner: ParametrizationFactory) -> None:
        super().__init__()
        self.inner = inner(task_vectors).requires_grad_(False)
        self.initial = self.inner.initial

    @property
    def local(self) -> bool:
        """As ``inner``."""
        return self.inner.local

    def forward(self, name: str, deltas: Deltas) -> Tensor:
        """The inner update."""
        update: Tensor = self.inner(name, deltas)
        return update

    @property
    def kept(self) -> int:
        """As ``inner``."""
        return self.inner.kept

    @property
    def per_element(self) -> int:
        """As ``inner``."""
        return self.inner.per_element

    def coefficients(self) -> dict[str, Tensor]:
        """Those of ``inner``."""
        return self.inner.coefficients()

    def values(self) -> dict[str, Tensor]:
        """Those of ``inner``."""
        return self.inner.values()

    def masks(self) -> dict[str, nn.Parameter]:
        """Those of ``inner``."""
        return self.inner.masks()
