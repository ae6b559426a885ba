"""WUDI in closed form: the merged task vector that interferes least with each expert's own, near their sum."""

from __future__ import annotations

import torch
from torch import Tensor

from adamerge.errors import ConfigError
from adamerge.solvers.base import MatrixSolver, finite
from adamerge.solvers.matrices import Matrix, summed


class Wudi(MatrixSolver):
    """Minimises ``sum_k ||(D - tau_k) tau_k^T||_F^2 / ||tau_k||_F^2 + ridge * c * ||D - sum_k tau_k||_F^2`` over ``D``.

    The rows of ``tau_k`` span the inputs of a linear layer that expert k was trained on, so the first term is how far the
    layer's output is from the expert's there. It is a linear system in the input dimension, solved by Cholesky:

        D (A + ridge c I) = B + ridge c sum_k tau_k,
        A = sum_k tau_k^T tau_k / ||tau_k||^2,  B = sum_k tau_k tau_k^T tau_k / ||tau_k||^2,  c = mean(diag(A))

    The paper has no ridge: it starts at the sum and stops after some steps, which ``WudiDescent`` does. Products are
    computed in fp32, the system is solved in fp64.

    Args:
        ridge: strength of the pull to the sum of the task vectors, in units of the mean of A's diagonal; positive.
        vector_scale: factor of the sum of what is no matrix; None for 1 / experts.

    Raises:
        ConfigError: the ridge is not positive, or a number is not finite.

    Reference: WUDI-Merging (Cheng et al., 2025), https://arxiv.org/abs/2503.08099; closed form with a ridge: ours.
    """

    def __init__(self, ridge: float = 1.0, vector_scale: float | None = None) -> None:
        super().__init__(vector_scale)
        finite(self, ridge=ridge)
        if ridge <= 0:
            raise ConfigError(
                f"Wudi: ridge must be positive, got {ridge}", todo="WudiDescent is the paper's own, without a ridge"
            )
        self.ridge = ridge

    def merged(self, experts: list[Matrix]) -> Tensor:
        """Returns the merged delta of one matrix, ``(rows, columns)`` in fp32."""
        a, b = interference(experts)
        mean = a.diagonal().mean()
        pull = self.ridge * torch.where(mean > 0, mean, 1.0)  # of experts that changed nothing the sum is 0
        total = summed(experts).dense()
        b += pull * total.double()
        a.diagonal().add_(pull)
        # A is symmetric: D A = B is A D^T = B^T
        return torch.cholesky_solve(b.T, torch.linalg.cholesky(a)).T.to(total.dtype).contiguous()


def interference(experts: list[Matrix]) -> tuple[Tensor, Tensor]:
    """Returns ``A`` (columns, columns) and ``B`` (rows, columns) in fp64: half the gradient of WUDI's loss is ``D A - B``.

    An expert that changed nothing of the tensor has no part in them.

    Args:
        experts: their deltas of one matrix.
    """
    parts = []
    for expert in experts:
        norm = expert.square_norm()
        weight = torch.where(norm > 0, 1 / norm, 0.0)
        parts.append((weight * expert.gram().double(), weight * expert.cubed().double()))
        if len(parts) == 2:  # no more than one expert's beside the sums
            parts = [(parts[0][0].add_(parts[1][0]), parts[0][1].add_(parts[1][1]))]
    return parts[0]
