"""Components: each expert's task vector as the singular components of every matrix, decomposed once and kept in a file."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from adamerge.checkpoints.lora_factors import matrix_shape
from adamerge.errors import ConfigError
from adamerge.io.task_vector_file import DELTA, FACTORS
from adamerge.solvers.base import TaskVectorWriter
from adamerge.solvers.matrices import matrices, weighty
from adamerge.task_vectors.task_vectors import TaskVectors


class Components(TaskVectorWriter):
    """``tau_k = sum_j u_kj v_kj^T`` of every expert and matrix: ``u = U sqrt(S)``, ``v = V sqrt(S)`` of ``tau_k = U S V^T``.

    The order and the rotation of nearly equal components differ between machines, and with the number of threads: what is
    learned for them has a meaning only beside the file. A later stage names it ``model.task_vectors.components``, and each
    expert's coefficient 1 on all components is its task vector again, as far as fp32 and ``rank`` go. Matrices are a
    tensor's first dimension by all others. What is no matrix stays a delta. Components that are nothing but rounding are
    zeros. Of one expert's P elements of square matrices the factors have 2 P numbers, in fp32. LoRA experts are decomposed
    through their factors, and have as many components as these.

    Args:
        rank: components of each matrix, the largest ones: a number of them, or below 1 a share of those that there are, one
            at least; all when None.

    Raises:
        ConfigError: the rank is not positive, or a share above 1.

    Reference: Task Singular Vectors (Gargiulo et al., 2025), https://arxiv.org/abs/2412.00081, section 3.
    """

    file, single = "components", False

    def __init__(self, rank: int | float | None = None) -> None:
        if rank is not None and not (0 < rank < math.inf and (rank < 1 or rank == int(rank))):
            raise ConfigError(
                f"Components: rank must be a whole number from 1 on, a share below 1, or null for all, got {rank}"
            )
        self.rank = rank

    def entries(self, name: str, vectors: TaskVectors) -> dict[str, torch.Size]:
        """Returns a key for each expert: factors of a matrix, where the expert changed it, else the delta."""
        shape = vectors.shape(name)
        if not is_matrix(shape):
            return {f"{expert}/{DELTA}/{name}": shape for expert in vectors.experts}
        rows, columns = matrix_shape(shape)
        counts = [self._kept(shape, terms) for terms in vectors.unlearned(name).terms(len(vectors.experts))]
        return {
            f"{expert}/{FACTORS}/{name}": torch.Size([rows + columns, count])
            for expert, count in zip(vectors.experts, counts, strict=True)
            if count
        }

    def tensors(self, name: str, vectors: TaskVectors) -> Iterator[Tensor]:
        """Yields the factors of one expert after the other, or their deltas of what is no matrix."""
        deltas = vectors[name]
        if is_matrix(deltas.shape):
            for matrix in matrices(deltas):
                u, s, vt = matrix.all_components()
                count = self._kept(deltas.shape, len(s))
                if count:
                    scale = torch.where(weighty((u, s, vt)), s, 0.0).sqrt()[:count]
                    yield torch.cat([u[:, :count] * scale, vt[:count].t() * scale])
        else:
            for rows in deltas.widened(torch.float32):
                for row in rows:
                    yield row.reshape(deltas.shape)

    def _kept(self, shape: torch.Size, terms: int | None) -> int:
        """Returns how many components of an expert are kept, of a matrix that is a sum of so many; dense when None."""
        there = min([*matrix_shape(shape), *([] if terms is None else [terms])])
        if self.rank is None:
            return there
        return min(there, max(1, math.floor(self.rank * there)) if self.rank < 1 else int(self.rank))


def is_matrix(shape: torch.Size) -> bool:
    """Returns whether a tensor has components: two dimensions or more, and elements."""
    return len(shape) > 1 and shape.numel() > 0
