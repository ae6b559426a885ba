"""The weighted sum of the task vectors as one vector: task arithmetic, as a start for what is learned."""

from __future__ import annotations

from torch import Tensor

from adamerge.solvers.base import Solver, finite, scaled_sum
from adamerge.task_vectors.task_vectors import TaskVectors


class WeightedSum(Solver):
    """``scale * sum_k tau_k``.

    Args:
        scale: of the sum; None for 1 / experts, the average.

    Raises:
        ConfigError: the scale is not finite.

    Reference: Editing models with task arithmetic (Ilharco et al., 2023), https://arxiv.org/abs/2212.04089
    """

    def __init__(self, scale: float | None = 0.3) -> None:
        if scale is not None:
            finite(self, scale=scale)
        self.scale = scale

    def solve(self, name: str, vectors: TaskVectors) -> Tensor:
        """Returns ``scale * sum_k tau_k``, ``(*shape)`` in fp32."""
        return scaled_sum(vectors[name], self.scale)
