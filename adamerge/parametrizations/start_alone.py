"""The start alone: no coefficient, and nothing is added to it, which is how a solver's result is merged."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adamerge.deltas.base import Deltas
from adamerge.parametrizations.base import Parametrization
from adamerge.task_vectors.task_vectors import TaskVectors


class StartAlone(Parametrization):
    """``theta[e] = start[e]``: base and start as they are, or the base where there is no start; no expert is read.

    Args:
        task_vectors: not needed, since there are no coefficients.
    """

    initial = 0.0

    def __init__(self, task_vectors: TaskVectors) -> None:
        super().__init__()
        # of no numbers: a merged model is where its parametrization's parameters are
        self.none = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, name: str, deltas: Deltas) -> Tensor:
        """Returns zeros of the tensor's shape."""
        return torch.zeros(deltas.shape, dtype=torch.float32, device=deltas.device)

    def coefficients(self) -> dict[str, Tensor]:
        """Returns none."""
        return {}

    def values(self) -> dict[str, Tensor]:
        """Returns none."""
        return {}
