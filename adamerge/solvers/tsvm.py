"""TSV-Merge: the strongest singular components of each task, made orthogonal to one another and put together."""

from __future__ import annotations

import torch
from torch import Tensor

from adamerge.solvers.base import MatrixSolver, finite
from adamerge.solvers.matrices import Matrix, orthogonal


class TSVM(MatrixSolver):
    """``D = alpha * orth([U_1 ... U_T]) diag(s_1 ... s_T) orth([V_1 ... V_T])^T`` of the first 1/T components of each task.

    ``tau_k = U_k diag(s_k) V_k^T``, cut to ``floor(min(rows, columns) / T)`` components, one at least; ``orth`` is the
    nearest matrix with orthonormal columns, ``P Q^T`` of ``P S Q^T``. Components of no weight are left out, since their
    vectors are arbitrary. In fp32.

    Args:
        alpha: factor of the result; the paper's is 1.
        vector_scale: factor of the sum of what is no matrix; None for 1 / experts.

    Raises:
        ConfigError: a number is not finite.

    Reference: Task Singular Vectors (Gargiulo et al., 2025), https://arxiv.org/abs/2412.00081
    """

    def __init__(self, alpha: float = 1.0, vector_scale: float | None = None) -> None:
        super().__init__(vector_scale)
        finite(self, alpha=alpha)
        self.alpha = alpha

    def merged(self, experts: list[Matrix]) -> Tensor:
        """Returns the merged delta of one matrix, ``(rows, columns)`` in fp32."""
        parts = []
        for expert in experts:
            u, s, vt = expert.decomposed()
            share = max(1, min(len(u), vt.shape[1]) // len(experts))
            parts.append((u[:, :share], s[:share], vt[:share]))
        u, s, vt = (torch.cat(same, dim) for same, dim in zip(zip(*parts, strict=True), (1, 0, 0), strict=True))
        return self.alpha * ((orthogonal(u) * s) @ orthogonal(vt))
