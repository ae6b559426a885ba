"""Penalties on the coefficients themselves, added to the objective's loss."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from adamerge.errors import ConfigError
from adamerge.parametrizations import Parametrization


class Penalty(ABC):
    """A scalar of the coefficients."""

    @abstractmethod
    def __call__(self, parametrization: Parametrization) -> Tensor:
        """The penalty, differentiable in the coefficients."""


class DistanceToInitial(Penalty):
    """``weight * mean |c - c_initial| ** power`` over all coefficients of all experts.

    Args:
        weight: factor of the mean.
        power: 1 for the L1 distance of Expert Merging, 2 for a quadratic pull.

    Raises:
        ConfigError: a number is out of range.

    Reference: Expert Merging (2025), https://arxiv.org/abs/2509.25712, whose regulariser is the L1 form.
    """

    def __init__(self, weight: float = 1.0, power: float = 1.0) -> None:
        if weight < 0 or power < 1:
            raise ConfigError(f"DistanceToInitial: weight must be >= 0 and power >= 1, got {weight} and {power}")
        self.weight, self.power = weight, power

    def __call__(self, parametrization: Parametrization) -> Tensor:
        """The weighted mean distance."""
        coefficients = torch.cat([value.flatten() for value in parametrization.coefficients().values()])
        return self.weight * (coefficients - parametrization.initial).abs().pow(self.power).mean()
