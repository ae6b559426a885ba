"""Chunks where they matter: important tensors are split into several chunks, unimportant ones stay at the prior."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from adamerge.deltas.groups import Chunks, Groups
from adamerge.errors import ConfigError
from adamerge.io.untrusted_files import read_json
from adamerge.io.unwritten import is_unwritten
from adamerge.parametrizations.constraints import Constraint
from adamerge.parametrizations.linear import Linear
from adamerge.task_vectors.task_vectors import TaskVectors


class ImportanceChunkWise(Linear):
    """``m_l`` coefficients per expert for tensor l, one per contiguous chunk; where ``m_l`` is 0, the initial coefficient.

    ``m_l = floor(budget * L * I_l^kappa / sum_j I_j^kappa)`` over the L merged tensors. The importances ``I`` come from a
    first fit with one coefficient per tensor. ``coefficients`` and ``values`` hold what is learned, not what stays.

    Args:
        task_vectors: names and shapes decide the groups.
        init: the initial coefficient, the prior; None for 1 / experts.
        constraint: from ``w`` to coefficients.
        importance: tensor name to importance, or a JSON file of that; others than the merged tensors are left out.
        budget: coefficients per expert and tensor, on average; flooring may spend less.
        kappa: 0 shares evenly, above 1 concentrates.
        allocation: tensor name to ``m_l``, instead of all three; a coefficient file has it.

    Raises:
        ConfigError: no importance of a merged tensor, a number out of range, nothing left to learn, or the constraint
            cannot hold the initial coefficient.

    Reference: Expert Merging++ (Zhang et al., 2025), https://arxiv.org/abs/2509.25712.
    """

    def __init__(
        self,
        task_vectors: TaskVectors,
        init: float | None = 0.3,
        constraint: Constraint | None = None,
        *,
        importance: str | dict[str, float] | None = None,
        budget: float = 1.0,
        kappa: float = 1.0,
        allocation: dict[str, int] | None = None,
    ) -> None:
        self.budget, self.kappa = budget, kappa
        if is_unwritten(importance):
            self.importance: dict[str, float] | None = dict.fromkeys(task_vectors, 1.0)
        else:
            self.importance = read_json(Path(importance)) if isinstance(importance, str | Path) else importance
        if allocation is None:
            if self.importance is None:
                raise ConfigError(
                    "ImportanceChunkWise: importance is missing",
                    expected="a JSON file of importances by tensor name",
                    got="nothing",
                    todo="run a first stage with LayerWise, and pass the importances of its coefficient file",
                )
            allocation = _allocated(self.importance, task_vectors, budget, kappa)
        self.allocation = allocation
        _check(allocation, task_vectors)
        super().__init__(task_vectors, init, constraint)

    def group(self, name: str) -> str | None:
        """Returns the tensor's own name, when it has coefficients."""
        return name if self.allocation[name] > 0 else None

    def groups(self, name: str, task_vectors: TaskVectors) -> Groups:
        """Returns contiguous chunks, as many as the allocation gives the tensor."""
        return Chunks(max(1, self.allocation[name]))


def _allocated(importance: Mapping[str, float], vectors: TaskVectors, budget: float, kappa: float) -> dict[str, int]:
    missing = [name for name in vectors if name not in importance]
    if missing:
        raise ConfigError(
            f"ImportanceChunkWise: no importance of '{missing[0]}'", todo="merge the same tensors in both stages"
        )
    numbers = {name: importance[name] for name in vectors}
    if not all(isinstance(number, int | float) and 0 <= number < math.inf for number in numbers.values()):
        raise ConfigError("ImportanceChunkWise: importances must be finite and not negative", got=importance)
    if not (0 < budget < math.inf and 0 <= kappa < math.inf):
        raise ConfigError(f"ImportanceChunkWise: budget must be > 0 and kappa >= 0, got {budget} and {kappa}")
    return allocate(numbers, budget, kappa, {name: vectors.shape(name).numel() for name in vectors})


def allocate(importance: Mapping[str, float], budget: float, kappa: float, numel: Mapping[str, int]) -> dict[str, int]:
    """Returns ``m_l = floor(budget * L * I_l^kappa / sum_j I_j^kappa)``, at most a tensor's number of elements."""
    largest = max(importance.values()) or 1.0  # powers of the shares of the largest: no underflow of all at once
    powers = {name: (number / largest) ** kappa for name, number in importance.items()}
    total = math.fsum(powers.values()) or 1.0
    # a share that is a whole number but for rounding is that number
    shares = {name: budget * len(powers) * power / total + 1e-9 for name, power in powers.items()}
    return {name: min(math.floor(share), numel[name]) for name, share in shares.items()}


def _check(allocation: Mapping[str, int], vectors: TaskVectors) -> None:
    if allocation.keys() != set(vectors):
        odd = sorted(allocation.keys() ^ set(vectors))
        raise ConfigError(f"ImportanceChunkWise: the allocation is not that of the merged tensors: {odd[:5]}")
    for name, count in allocation.items():
        if type(count) is not int or not 0 <= count <= max(1, vectors.shape(name).numel()):
            raise ConfigError(f"ImportanceChunkWise: '{name}' cannot have {count!r} chunks")
    if not any(allocation.values()):
        raise ConfigError(
            "ImportanceChunkWise: no tensor has a coefficient", todo="raise the budget: shares below 1 become 0"
        )
