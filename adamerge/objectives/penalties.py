"""Penalties on the coefficients themselves, added to the objective's loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from adamerge.errors import ConfigError
from adamerge.parametrizations import Parametrization


class Penalty(ABC):
    """A scalar that depends on the coefficients alone, added to the objective's loss."""

    @abstractmethod
    def __call__(self, parametrization: Parametrization) -> Tensor:
        """Returns the penalty, a scalar that is differentiable in the coefficients."""


class DistanceToInitial(Penalty):
    """``weight / (experts * groups) * sum |c - c_initial| ** power`` over all coefficients of all experts and groups.

    With one coefficient per group, as in the layer-wise case, this is their mean distance, and ``weight`` is the paper's
    gamma; the released code is ``experts`` times larger at the same gamma. Where a group has several coefficients, as with
    chunks, its distances are added up. Tensors that are frozen at the initial value are no groups: they do not count, nor
    does an expert in a group where all its coefficients are held.

    Args:
        weight: gamma.
        power: 1 for the L1 distance of Expert Merging, 2 for a quadratic pull.

    Raises:
        ConfigError: a number is out of range.

    Reference: Expert Merging (Zhang et al., 2025), https://arxiv.org/abs/2509.25712, R, which is the L1 form.
    """

    def __init__(self, weight: float = 1.0, power: float = 1.0) -> None:
        if weight < 0 or power < 1:
            raise ConfigError(f"DistanceToInitial: weight must be >= 0 and power >= 1, got {weight} and {power}")
        self.weight, self.power = weight, power

    def __call__(self, parametrization: Parametrization) -> Tensor:
        """Returns the weighted distance of the coefficients to the initial ones, a scalar."""
        groups = parametrization.coefficients()
        coefficients = torch.cat([own - parametrization.begun(group) for group, own in groups.items()], dim=1)
        distances = coefficients.abs().pow(self.power)
        count = len(coefficients) * len(groups) - parametrization.held_pairs
        return self.weight * _learned(distances, parametrization, groups).sum() / count


class SummedDistanceToInitial(DistanceToInitial):
    """``DistanceToInitial`` times the number of experts: ``weight / groups * sum |c - c_initial| ** power``.

    This is what the released code of Expert Merging computes for its gamma.

    Reference: Expert Merging (Zhang et al., 2025), https://arxiv.org/abs/2509.25712; Littleor/ExpertMerging.
    """

    def __call__(self, parametrization: Parametrization) -> Tensor:
        """Returns the weighted distance to the initial coefficients, summed over experts."""
        experts = len(next(iter(parametrization.coefficients().values())))
        return experts * super().__call__(parametrization)


class CoefficientNorm(Penalty):
    """``weight * mean_p ||c[:, p]||_order``: the norm over the experts, mean over the coefficients that each expert has.

    What is held is in no norm, and where it is held for all experts in no mean.

    Args:
        weight: gamma.
        order: of the norm: 1 leaves each tensor to few experts, 2 shrinks all of them.

    Raises:
        ConfigError: a number is out of range.

    Reference: aTLAS (Zhang et al., 2024), https://arxiv.org/abs/2407.02880, the regulariser of task addition.
    """

    def __init__(self, weight: float = 0.5, order: float = 1.0) -> None:
        if weight < 0 or order < 1:
            raise ConfigError(f"CoefficientNorm: weight must be >= 0 and order >= 1, got {weight} and {order}")
        self.weight, self.order = weight, order

    def __call__(self, parametrization: Parametrization) -> Tensor:
        """Returns the weighted mean norm of the coefficients; its gradient at 0 is 0."""
        groups = parametrization.coefficients()
        coefficients = _learned(torch.cat(list(groups.values()), dim=1), parametrization, groups)
        norms = torch.linalg.vector_norm(coefficients, ord=self.order, dim=0)
        if not parametrization.held:
            return self.weight * norms.mean()
        return self.weight * norms.sum() / _held(parametrization, groups).logical_not().any(dim=0).sum()


def _learned(values: Tensor, parametrization: Parametrization, groups: Iterable[str]) -> Tensor:
    """Returns the values of all coefficients, ``(experts, coefficients)``, with 0 where they are held."""
    return torch.where(_held(parametrization, groups), 0.0, values) if parametrization.held else values


def _held(parametrization: Parametrization, groups: Iterable[str]) -> Tensor:
    return torch.cat([parametrization.held[group] for group in groups], dim=1)
