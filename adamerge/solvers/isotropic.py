"""Isotropic merging: the sum of the task vectors with all its singular values made equal, Iso-C and Iso-CTS."""

from __future__ import annotations

import torch
from torch import Tensor

from adamerge.errors import ConfigError
from adamerge.solvers.base import MatrixSolver, finite
from adamerge.solvers.matrices import Matrix, orthogonal, summed


class IsoC(MatrixSolver):
    """``D = alpha * mean(s) * U V^T`` of ``sum_k tau_k = U diag(s) V^T``.

    Components of no weight are left out of the product and of the mean, since their vectors are arbitrary. In fp32.

    Args:
        alpha: factor of the result; chosen on a validation split in the paper.
        vector_scale: factor of the sum of what is no matrix; None for 1 / experts.

    Raises:
        ConfigError: a number is not finite.

    Reference: No Task Left Behind (Marczak et al., 2025), https://arxiv.org/abs/2502.04959
    """

    def __init__(self, alpha: float = 1.5, vector_scale: float | None = None) -> None:
        super().__init__(vector_scale)
        finite(self, alpha=alpha)
        self.alpha = alpha

    def merged(self, experts: list[Matrix]) -> Tensor:
        """Returns the merged delta of one matrix, ``(rows, columns)`` in fp32."""
        u, s, vt = summed(experts).decomposed()
        return self.alpha * s.sum() / max(1, len(s)) * (u @ vt)


class IsoCTS(MatrixSolver):
    """``D = alpha * mean(s) * orth(U) orth(V)^T`` of common components of the sum and some of each task's own.

    The common ones are the first of ``sum_k tau_k = U_c diag(s_c) V_c^T``. Those of task k are the first of ``tau_k - U_c
    U_c^T tau_k``, as many for each task: together ``min(rows, columns)``, of which about the share ``common`` is common.
    ``orth`` is the nearest matrix with orthonormal columns, and the mean is over all components. In fp32.

    Args:
        alpha: factor of the result; chosen on a validation split in the paper.
        common: share of the components that are the sum's, in [0, 1]; 0.8 in the paper.
        vector_scale: factor of the sum of what is no matrix; None for 1 / experts.

    Raises:
        ConfigError: a number is out of range.

    Reference: No Task Left Behind (Marczak et al., 2025), https://arxiv.org/abs/2502.04959
    """

    def __init__(self, alpha: float = 1.5, common: float = 0.8, vector_scale: float | None = None) -> None:
        super().__init__(vector_scale)
        finite(self, alpha=alpha)
        if not 0 <= common <= 1:
            raise ConfigError(f"IsoCTS: common must be in [0, 1], got {common}")
        self.alpha, self.common = alpha, common

    def merged(self, experts: list[Matrix]) -> Tensor:
        """Returns the merged delta of one matrix, ``(rows, columns)`` in fp32."""
        u, s, vt = summed(experts).decomposed()
        least = min(len(u), vt.shape[1])
        own = round((least - int(least * self.common)) / len(experts))  # of each task
        common = max(0, least - own * len(experts))
        parts = [(u[:, :common], s[:common], vt[:common])]
        for expert in experts if own else ():
            u, s, vt = expert.outside(parts[0][0]).decomposed(of=expert.square_norm().sqrt())
            parts.append((u[:, :own], s[:own], vt[:own]))
        u, s, vt = (torch.cat(same, dim) for same, dim in zip(zip(*parts, strict=True), (1, 0, 0), strict=True))
        return self.alpha * s.sum() / max(1, len(s)) * (orthogonal(u) @ orthogonal(vt))
