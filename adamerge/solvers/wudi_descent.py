"""WUDI by its own iteration: from the sum of the task vectors, some steps of Adam on the interference."""

from __future__ import annotations

import torch
from torch import Tensor

from adamerge.errors import ConfigError
from adamerge.solvers.base import MatrixSolver, finite
from adamerge.solvers.matrices import Matrix, summed
from adamerge.solvers.wudi import interference


class WudiDescent(MatrixSolver):
    """Takes ``steps`` steps of Adam on ``sum_k ||(D - tau_k) tau_k^T||_F^2 / ||tau_k||_F^2`` from ``D = sum_k tau_k``.

    The gradient is ``2 (D A - B)`` with the matrices of ``Wudi``, so a step costs one product whatever the number of
    experts. Adam's steps do not know the scale of the task vectors: ``lr`` times ``steps`` bounds how far an element goes.
    All in fp32.

    Args:
        lr: Adam's learning rate.
        steps: of Adam.
        vector_scale: factor of the sum of what is no matrix; None for 1 / experts.

    Raises:
        ConfigError: a number is out of range.

    Reference: WUDI-Merging (Cheng et al., 2025), https://arxiv.org/abs/2503.08099
    """

    def __init__(self, lr: float = 1e-5, steps: int = 300, vector_scale: float | None = None) -> None:
        super().__init__(vector_scale)
        finite(self, lr=lr)
        if lr <= 0 or steps < 0:
            raise ConfigError(f"WudiDescent: lr must be positive and steps not negative, got lr={lr}, steps={steps}")
        self.lr, self.steps = lr, steps

    def merged(self, experts: list[Matrix]) -> Tensor:
        """Returns the merged delta of one matrix, ``(rows, columns)`` in fp32."""
        merged = summed(experts).dense().clone()
        a, b = (matrix.to(merged.dtype) for matrix in interference(experts))
        adam = torch.optim.Adam([merged], lr=self.lr)
        for _ in range(self.steps):
            merged.grad = 2 * (merged @ a - b)
            adam.step()
        return merged
