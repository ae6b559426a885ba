"""A solver's task vector times a number: its strength, which few formulas give by themselves."""

from __future__ import annotations

from torch import Tensor

from adamerge.solvers.base import Solver, finite
from adamerge.solvers.sequential import alone
from adamerge.task_vectors.task_vectors import TaskVectors


class Scaled(Solver):
    """``scale`` times what another solver makes of a tensor.

    Args:
        solver: the other.
        scale: of its deltas.

    Raises:
        ConfigError: the scale is not finite, or the other solver sees inputs.
    """

    def __init__(self, solver: Solver, scale: float) -> None:
        alone(self, solver)
        finite(self, scale=scale)
        self.solver, self.scale = solver, scale

    def solve(self, name: str, vectors: TaskVectors) -> Tensor:
        """Returns the merged delta of one tensor, ``(*shape)`` in fp32."""
        return self.solver.solve(name, vectors).mul_(self.scale)
