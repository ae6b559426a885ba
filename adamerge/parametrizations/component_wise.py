"""Coefficients of components: one for each singular component of each matrix and expert, merged through their factors."""

from __future__ import annotations

from adamerge.deltas.groups import Components, Elements, Groups
from adamerge.errors import ConfigError
from adamerge.io.unwritten import TASK_VECTORS
from adamerge.parametrizations.per_tensor import PerTensor
from adamerge.task_vectors.task_vectors import TaskVectors


class ComponentWise(PerTensor):
    """A coefficient for each component of each matrix and expert: ``theta = theta0 + sum_k U_k diag(w_k) V_k^T``.

    ``U_k V_k^T`` is the expert's task vector of the tensor, as its first dimension by all others, and comes as factors from
    a file of components (``adamerge.Components``); of LoRA experts without one, components are the products of a column of B
    and a row of A. What has fewer than two dimensions has no components, and a coefficient for each element: with one for the
    whole of it, a bias would be the one tensor that cannot follow what its matrix became. With n components of all experts, a
    merge is one product of ``(rows, n)`` and ``(n, columns)``, a contraction another one, and no expert is ever dense: of F
    numbers of factors and P elements they take at most ``4 F + 2 P`` operations, ``6 F + 2 P`` from disk, a product counted
    by what it reads. An expert with fewer components than another has numbers that nothing depends on.

    Args:
        task_vectors: with components; names and shapes decide the groups.
        init: what task vectors are multiplied by at first; 0 begins at the base or the start, None is 1 / experts.

    Raises:
        ConfigError: init is not finite, or an expert's matrix is no sum of components.
    """

    def __init__(self, task_vectors: TaskVectors, init: float | None = 0.3) -> None:
        super().__init__(task_vectors, init)

    def groups(self, name: str, task_vectors: TaskVectors) -> Groups:
        """Returns components of a matrix, elements of a vector."""
        return components_of(self, name, task_vectors) or Elements(task_vectors.shape(name).numel())


def components_of(part: object, name: str, task_vectors: TaskVectors) -> Components | None:
    """Returns the components of a matrix; None of what has fewer than two dimensions, or no elements.

    Args:
        part: who asks for them, for errors.
        name: of the tensor.
        task_vectors: with components.

    Raises:
        ConfigError: an expert's matrix is no sum of components.
    """
    shape = task_vectors.shape(name)
    if len(shape) < 2 or shape.numel() == 0:
        return None
    terms = task_vectors.terms(name)
    if terms is None:
        raise ConfigError(
            f"{type(part).__name__}: '{name}' has no components, since its task vectors are whole tensors",
            expected="factors, as a stage with the solver adamerge.Components writes them",
            got="transforms after that stage" if task_vectors.components is not None else "experts alone",
            todo=f'put such a stage first, with the transforms, and set model.task_vectors.components: "{TASK_VECTORS}"',
        )
    return Components(terms)
