"""Coefficients by the million: rows and columns of each matrix, or each element, have coefficients of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adamerge.deltas.groups import Elements, Groups, RowsAndColumns
from adamerge.parametrizations.linear import Linear
from adamerge.task_vectors.task_vectors import TaskVectors

ROWS, COLUMNS = "/rows", "/columns"
"""What the groups of a matrix end in, after its name."""


class PerTensor(Linear, ABC):
    """A parameter ``(experts, coefficients)`` for each tensor, in place of one matrix for all; no constraint.

    The gradient of a tensor's numbers is then made once and by itself, also where blocks of a network come one by one. As
    they are factors of task vectors, one learning rate serves networks of any size. No coefficient is looked at alone:
    guards see the root mean square of a tensor's, and none is held for its gradient's rounding.

    Args:
        task_vectors: names and shapes decide the groups.
        init: what task vectors are multiplied by at first; None for 1 / experts.

    Raises:
        ConfigError: init is not finite.
    """

    probed = False

    def __init__(self, task_vectors: TaskVectors, init: float | None) -> None:
        super().__init__(task_vectors, init)

    def _allocate(self, experts: int, raw: float) -> None:
        self._numbers = {
            group: number for number, group in enumerate(self._columns)
        }  # names with dots name no parameter
        self.w = nn.ParameterList(  # type: ignore[assignment]
            torch.full((experts, columns.stop - columns.start), raw, dtype=torch.float32)
            for columns in self._columns.values()
        )

    def group(self, name: str) -> str:
        """Returns the tensor's own name, since each tensor is a group of its own."""
        return name

    @abstractmethod
    def groups(self, name: str, task_vectors: TaskVectors) -> Groups:
        """Returns which elements of tensor ``name`` use which of its coefficients."""

    def raw(self, group: str) -> Tensor:
        """Returns the raw values of a group: the parameter itself."""
        return self.w[self._numbers[group]]

    def values(self) -> dict[str, Tensor]:
        """Returns the raw values of each group, which are the coefficients."""
        return {group: self.raw(group).detach() for group in self._numbers}

    def sizes(self) -> dict[str, Tensor]:
        """Returns the root mean square of what multiplies each expert's elements: tensor name to ``(experts,)``."""
        moments = self.moments({group: own for group, own in self.values().items() if own.numel()})
        return {name: torch.hypot(*pair) for name, pair in moments.items()}


class RowColumnWise(PerTensor):
    """A coefficient for each row and one for each column of each matrix and expert, which are added.

    ``theta[i, j] = theta0[i, j] + sum_k (r_k[i] + c_k[j]) tau_k[i, j]``, rows along the tensor's first dimension, columns
    along all others; a tensor of fewer than two dimensions has a coefficient an element. Rows begin at ``init``, columns at
    0. Merge and contraction read the deltas once for both: at most ``(6T + 2) P`` operations for T stored experts of P
    elements. LoRA experts are summed and contracted by their factors, never dense.

    Args:
        task_vectors: names and shapes decide the groups.
        init: what task vectors are multiplied by at first; 0 begins at the base, None is 1 / experts.

    Raises:
        ConfigError: init is not finite.
    """

    def __init__(self, task_vectors: TaskVectors, init: float | None = 0.3) -> None:
        super().__init__(task_vectors, init)
        with torch.no_grad():
            for group, groups in self._groups.items():
                if isinstance(groups, RowsAndColumns):
                    self.raw(group)[:, groups.rows :] = 0.0

    def groups(self, name: str, task_vectors: TaskVectors) -> Groups:
        """Returns rows and columns of a matrix, elements of a vector."""
        shape = task_vectors.shape(name)
        return RowsAndColumns(shape[0], shape[1:].numel()) if len(shape) > 1 else Elements(shape.numel())

    def coefficients(self) -> dict[str, Tensor]:
        """Returns the coefficients: of a matrix as two groups, ``NAME/rows`` and ``NAME/columns``."""
        return {group: own for name in self._numbers for group, own in self._parts(name, self.raw(name)).items()}

    def values(self) -> dict[str, Tensor]:
        """Returns the raw values, which are the coefficients, in the same groups."""
        return {group: own.detach() for group, own in self.coefficients().items()}

    def begun(self, group: str) -> Tensor | float:
        """Returns ``init`` for rows and elements, and 0 for columns."""
        return 0.0 if group.endswith(COLUMNS) and group not in self._numbers else self.initial

    def _parts(self, name: str, own: Tensor) -> dict[str, Tensor]:
        groups = self._groups[name]
        if not isinstance(groups, RowsAndColumns):
            return {name: own}
        return {name + ROWS: own[:, : groups.rows], name + COLUMNS: own[:, groups.rows :]}

    @staticmethod
    def moments(values: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns mean and standard deviation over a matrix of ``r[i] + c[j]``, which are those of r and of c added."""
        moments = {}
        for group, own in values.items():
            name = group.removesuffix(COLUMNS)
            if name != group and name + ROWS in values:
                continue  # with its rows
            name = group.removesuffix(ROWS)
            parts = [own, values[name + COLUMNS]] if name != group and name + COLUMNS in values else [own]
            means, variances = ([one(part, dim=1) for part in parts] for one in (torch.mean, _variance))
            moments[name if len(parts) > 1 else group] = (
                sum(means[1:], means[0]),
                sum(variances[1:], variances[0]).sqrt(),
            )
        return moments


def _variance(own: Tensor, dim: int) -> Tensor:
    return own.var(dim=dim, correction=0)


class ElementWise(PerTensor):
    """A coefficient for each element of each expert: ``theta[e] = theta0[e] + sum_k w_k[e] tau_k[e]``.

    As many numbers are learned as all experts have, and an optimiser's state beside them. Over one task vector of
    ``RootSumSquare`` it is one number an element, in units of all experts' root sum of squares; what holds for single
    experts does not hold there. A LoRA expert's deltas are made dense, one tensor at a time.

    Args:
        task_vectors: names and shapes decide the groups.
        init: what task vectors are multiplied by at first; 0 begins at the base, None is 1 / experts.

    Raises:
        ConfigError: init is not finite.
    """

    def __init__(self, task_vectors: TaskVectors, init: float | None = 0.0) -> None:
        super().__init__(task_vectors, init)

    def groups(self, name: str, task_vectors: TaskVectors) -> Groups:
        """Returns each element by itself."""
        return Elements(task_vectors.shape(name).numel())
