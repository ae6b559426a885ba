"""Rank mask: which singular components of each expert are merged, learned as 0 or 1 beside the coefficients (AdaRank)."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from adamerge.deltas.base import Deltas
from adamerge.deltas.groups import Groups, Whole
from adamerge.errors import ConfigError
from adamerge.parametrizations.base import Parametrization, ParametrizationFactory
from adamerge.parametrizations.component_wise import components_of
from adamerge.parametrizations.wrapper import Wrapper
from adamerge.task_vectors.task_vectors import TaskVectors


class RankMask(Wrapper):
    """``theta = theta0 + sum_k c_k U_k diag(m_k) V_k^T`` with ``m = 1[sigmoid(x / temperature) > 1/2]``, so ``m = 1[x > 0]``.

    ``c`` are the coefficients of ``inner``, one for a tensor. The gradient passes straight through the step, as that of
    ``sigmoid(x / temperature)``: for the gradient ``G`` of the merged tensor, ``dL/dx_kj = c_k <G, u_kj v_kj^T> s (1 - s) /
    temperature``, ``s`` the sigmoid, which is what the paper's released code computes. What has fewer than two dimensions
    has no mask, and what is exported has the same mask as what was learned. Logits move by a search's rate in units of
    their own: at the paper's Adam 1e-3 one needs a hundred steps of one sign from ``initial_logit`` to 0.

    Args:
        task_vectors: with components, as a stage with ``adamerge.Components`` writes them.
        inner: a parametrization with one coefficient for each tensor and expert, such as ``LayerWise``.
        keep: share of an expert's components, the largest ones, that are merged at first.
        initial_logit: of these; that of the others is its negative.
        temperature: of the sigmoid whose gradient the step has.

    Raises:
        ConfigError: a number is out of range, an expert's matrix is no sum of components, or ``inner`` has several
            coefficients for a matrix or an update that is no sum.

    Reference: AdaRank (Lee et al., 2025), https://arxiv.org/abs/2503.22178; straight-through gradients (Bengio et al., 2013),
    https://arxiv.org/abs/1308.3432.
    """

    def __init__(
        self,
        task_vectors: TaskVectors,
        inner: ParametrizationFactory,
        *,
        keep: float = 1.0,
        initial_logit: float = 0.1,
        temperature: float = 10.0,
    ) -> None:
        if not 0 <= keep <= 1:
            raise ConfigError(f"RankMask: keep must be a share from 0 to 1, got {keep}")
        for key, value in (("initial_logit", initial_logit), ("temperature", temperature)):
            if not 0 < value < math.inf:
                raise ConfigError(f"RankMask: {key} must be positive, got {value}")
        super().__init__(task_vectors, inner)
        self.keep, self.initial_logit, self.temperature = keep, initial_logit, temperature
        every = {name: components_of(self, name, task_vectors) for name in task_vectors}
        self._components = {name: own for name, own in every.items() if own is not None}
        asked = copy.deepcopy(self.inner)  # what a parametrization has been asked for holds on to its parameters
        for name in self._components:
            _one_coefficient(asked, name)
        self._numbers = {name: number for number, name in enumerate(self._components)}  # dots name no parameter
        self.logits = nn.ParameterList(
            self._initial(len(task_vectors.experts), own.count) for own in self._components.values()
        )

    def linear(self, name: str) -> tuple[Tensor, Groups] | None:
        """Returns the coefficients of a tensor's components, those of ``inner`` times the mask, differentiable in both."""
        if name not in self._components:
            return self.inner.linear(name)
        return _one_coefficient(self.inner, name) * self._mask(name), self._components[name]

    def forward(self, name: str, deltas: Deltas) -> Tensor:
        """Returns the update of tensor ``name`` by the components that the mask leaves."""
        linear = self.linear(name)
        return self.inner(name, deltas) if linear is None else deltas.combine(*linear)

    def masks(self) -> dict[str, nn.Parameter]:
        """Returns the logits of this mask: tensor name to ``(experts, components)``."""
        return {name: self.logits[number] for name, number in self._numbers.items()}

    def _initial(self, experts: int, count: int) -> Tensor:
        logits = torch.full((experts, count), self.initial_logit, dtype=torch.float32)
        logits[:, int(self.keep * count) :].neg_()
        return logits

    def _mask(self, name: str) -> Tensor:
        """Returns ``1[x > 0]``, ``(experts, components)``, with the gradient of ``sigmoid(x / temperature)``."""
        logits = self.logits[self._numbers[name]]
        soft = torch.sigmoid(logits / self.temperature)
        return (logits > 0).to(soft.dtype) + (soft - soft.detach())


def _one_coefficient(inner: Parametrization, name: str) -> Tensor:
    """Returns the coefficients of a matrix, ``(experts, 1)``.

    Raises:
        ConfigError: there are several, or the update is no sum.
    """
    linear = inner.linear(name)
    if linear is None or not isinstance(linear[1], Whole):
        raise ConfigError(
            f"RankMask: {type(inner).__name__} has more than one coefficient for '{name}'",
            expected="one for each tensor and expert, which all of its components share",
            todo="take adamerge.LayerWise, BlockWise or TaskWise inside",
        )
    return linear[0]
