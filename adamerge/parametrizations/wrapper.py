"""A wrapper: a parametrization around another one, of which it changes what its file says and hands on the rest."""

from __future__ import annotations

from abc import ABC

from torch import Tensor, nn

from adamerge.parametrizations.base import Parametrization, ParametrizationFactory
from adamerge.task_vectors.task_vectors import TaskVectors


class Wrapper(Parametrization, ABC):
    """Has the coefficients, values, masks and memory of ``inner``; the update is what a subclass makes of it.

    Args:
        task_vectors: handed on.
        inner: what is wrapped.
    """

    def __init__(self, task_vectors: TaskVectors, inner: ParametrizationFactory) -> None:
        super().__init__()
        self.inner = inner(task_vectors)
        self.initial, self.probed = self.inner.initial, self.inner.probed

    @property
    def index_bytes(self) -> int:
        """Returns the bytes of indices that contractions of ``inner`` keep."""
        return self.inner.index_bytes

    @property
    def transient_per_element(self) -> int:
        """Returns the temporary bytes per element while ``inner`` sums tensors."""
        return self.inner.transient_per_element

    def coefficients(self) -> dict[str, Tensor]:
        """Returns the constrained coefficients of ``inner``."""
        return self.inner.coefficients()

    def begun(self, group: str) -> Tensor | float:
        """Returns the coefficients of a group that a fit of ``inner`` begins with."""
        return self.inner.begun(group)

    def sizes(self) -> dict[str, Tensor]:
        """Returns how large the coefficients of ``inner`` are."""
        return self.inner.sizes()

    def values(self) -> dict[str, Tensor]:
        """Returns the raw values of ``inner``."""
        return self.inner.values()

    def masks(self) -> dict[str, nn.Parameter]:
        """Returns the logits of a mask that ``inner`` has."""
        return self.inner.masks()

    def project_(self) -> None:
        """Puts the raw values of ``inner`` back into their constraint's set."""
        self.inner.project_()


def kind_of(parametrization: Parametrization) -> type[Parametrization]:
    """Returns the class of a parametrization whose coefficients these are: of the one inside, where it is wrapped."""
    return kind_of(parametrization.inner) if isinstance(parametrization, Wrapper) else type(parametrization)
