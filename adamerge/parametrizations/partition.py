"""Random partitions: elements of a tensor that share a coefficient are strewn over it, by a hash and no generator."""

from __future__ import annotations

from functools import lru_cache

import numpy
import torch
from torch import Tensor

from adamerge.deltas.groups import Groups, Ids
from adamerge.deltas.splitmix64 import GAMMA, mix_, start_of
from adamerge.deltas.tuning import HASHED_IDS
from adamerge.errors import ConfigError
from adamerge.parametrizations.constraints import Constraint
from adamerge.parametrizations.linear import Linear
from adamerge.task_vectors.task_vectors import TaskVectors


def partition_ids(seed: int, name: str, numel: int, parts: int) -> Tensor:
    """Returns the part of each element: a mix of the flat index and of ``sha256(seed, name)``, the same on every machine.

    Returns:
        ``(numel,)`` on the CPU, in the smallest integer dtype that holds ``parts`` numbers.
    """
    start = start_of(f"{seed}/{name}")
    ids = torch.empty(numel, dtype=Ids.dtype(parts))
    for first in range(0, numel, HASHED_IDS):
        z = numpy.arange(first + 1, min(first + HASHED_IDS, numel) + 1, dtype=numpy.uint64)
        z *= numpy.uint64(GAMMA)
        z += numpy.uint64(start)
        mix_(z)
        # the upper half times the number of parts, and of that the upper half: as even as a division, and quicker
        z >>= numpy.uint64(32)
        z *= numpy.uint64(parts)
        z >>= numpy.uint64(32)
        ids[first : first + len(z)] = torch.from_numpy(z.view(numpy.int64))
    return ids


# one tensor's ids, for the experts that are read one after the other
_latest = lru_cache(maxsize=1)(partition_ids)


class RandomPartition(Linear):
    """Several coefficients per expert and parameter tensor, each of a random part of its elements, whatever its rank.

    Every tensor has a partition of its own. The ids, a byte an element for up to 256 parts, are kept from the first
    contraction on, so that merging alone (export, evaluation) keeps none. One merge and one contraction touch (4T+5)P
    elements for T stored experts, (6T+5)P when they are read from disk.

    Args:
        task_vectors: names and shapes decide the groups.
        init: the initial coefficient; None for 1 / experts.
        constraint: from ``w`` to coefficients.
        parts: of each tensor; a tensor with fewer elements gets one per element at most.
        seed: of the partitions.

    Raises:
        ConfigError: parts is below 1, or the constraint cannot hold the initial coefficient.

    Reference: aTLAS (Zhang et al., 2024), https://arxiv.org/abs/2407.02880, section 5.3, aTLASxK.
    """

    def __init__(
        self,
        task_vectors: TaskVectors,
        init: float | None = 0.0,
        constraint: Constraint | None = None,
        parts: int = 5,
        seed: int = 0,
    ) -> None:
        if type(parts) is not int or type(seed) is not int or not 1 <= parts <= 1 << 31:
            raise ConfigError(
                f"RandomPartition: parts must be at least 1, and both integers, got parts={parts}, seed={seed}"
            )
        self.parts, self.seed = parts, seed
        super().__init__(task_vectors, init, constraint)

    def group(self, name: str) -> str:
        """Returns the tensor's own name, since each tensor is a group of its own."""
        return name

    def groups(self, name: str, task_vectors: TaskVectors) -> Groups:
        """Returns parts by hash, at most as many as the tensor has elements."""
        numel = task_vectors.shape(name).numel()
        count = max(1, min(self.parts, numel))
        seed = self.seed
        return Ids(count, lambda: _latest(seed, name, numel, count))
