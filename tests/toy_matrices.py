"""What the tests of solvers share: small pools of matrices, dense and as factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adamerge.checkpoints.lora_factors import Factors, matrix_shape
from adamerge.deltas.base import DenseDeltas
from adamerge.deltas.low_rank import LowRankDeltas

CPU = torch.device("cpu")


def taus(*shape: int, experts: int = 3, seed: int = 0, scale: float = 0.05) -> Tensor:
    """Deltas of some experts, ``(experts, *shape)`` in fp32, of sizes as fine-tuning has them."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(experts, *shape, generator=generator)


def dense(values: Tensor) -> DenseDeltas:
    return DenseDeltas(values)


def factors_of(shape: Sequence[int], ranks: Sequence[int], seed: int = 0) -> list[Factors]:
    """Factors of each expert, of these ranks; scales that are not 1."""
    rows, columns = matrix_shape(torch.Size(shape))
    generator = torch.Generator().manual_seed(seed)
    every = []
    for number, rank in enumerate(ranks):
        left = torch.randn(rows, rank, generator=generator)
        right = 0.1 * torch.randn(rank, columns, generator=generator)
        every.append(Factors(rank, 0.5 + number, lambda left=left: left, lambda right=right: right))
    return every


def low_rank_of(factors: Sequence[Factors], shape: Sequence[int]) -> tuple[LowRankDeltas, Tensor]:
    """The deltas of factors, and the same as numbers ``(experts, *shape)``."""
    deltas = LowRankDeltas.of(list(factors), torch.Size(shape), CPU)
    return deltas, torch.stack([one.dense(torch.float64).float().view(*shape) for one in factors])
