"""A solver's task vector, weaker where it would change a matrix of the base by too large a part: strength without data."""

from __future__ import annotations

import torch
from torch import Tensor

from adamerge.checkpoints.lora_factors import matrix_shape
from adamerge.errors import ConfigError
from adamerge.solvers.base import Solver, finite
from adamerge.solvers.sequential import alone
from adamerge.task_vectors.task_vectors import TaskVectors


class SpectralBound(Solver):
    """``min(1, share * ||theta_0|| / ||D||) * D``, with ``D`` what another solver makes of a matrix, in spectral norms.

    The largest singular value says by how much a matrix can change what leaves it. Experts that went far from the base, or
    changed few directions by much, disturb each other in all that follows, at full strength; where to stop is in no formula
    that sees deltas alone. Tensors of fewer than two dimensions, and those whose base is zero, stay as they are.

    Args:
        solver: the other.
        dense: share of the base's largest singular value that the delta's may have.
        low_rank: the same of matrices whose deltas are LoRA factors in all experts: these have few directions, all large.

    Raises:
        ConfigError: a share is not positive and finite, or the other solver sees inputs.
    """

    def __init__(self, solver: Solver, dense: float = 0.25, low_rank: float = 0.1) -> None:
        alone(self, solver)
        finite(self, dense=dense, low_rank=low_rank)
        if min(dense, low_rank) <= 0:
            raise ConfigError(f"SpectralBound: shares must be positive, got dense {dense} and low_rank {low_rank}")
        self.solver, self.dense, self.low_rank = solver, dense, low_rank

    def solve(self, name: str, vectors: TaskVectors) -> Tensor:
        """Returns the merged delta of one tensor, ``(*shape)`` in fp32."""
        delta = self.solver.solve(name, vectors)
        if delta.ndim < 2 or delta.numel() == 0:
            return delta
        share = self.dense if vectors.terms(name) is None else self.low_rank
        bound, size = share * spectral_norm(vectors.base_tensor(name)), spectral_norm(delta)
        return delta.mul_(torch.where((bound > 0) & (size > bound), bound / size, 1.0).to(delta.dtype))


def spectral_norm(tensor: Tensor) -> Tensor:
    """Returns the largest singular value of a tensor's first dimension by all others, a number in fp64.

    It is that of the smaller Gram matrix, which rounds it by a few units in the last place of fp32.
    """
    matrix = tensor.float().reshape(matrix_shape(tensor.shape))
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram.double())[-1].clamp(min=0).sqrt()
