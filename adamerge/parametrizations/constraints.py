"""Constraints: how raw parameters ``w`` become merging coefficients ``phi(w)``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from adamerge.errors import ConfigError


class Constraint(ABC):
    """``phi`` of theta0 + sum_k phi(w)_k tau_k. Acts on ``(experts, groups)``; elementwise unless it says otherwise."""

    @abstractmethod
    def __call__(self, w: Tensor) -> Tensor:
        """Returns the coefficients of raw parameters ``w``; (experts, groups) to the same shape."""

    @abstractmethod
    def raw(self, coefficient: float) -> float:
        """Returns the ``w`` whose coefficient is ``coefficient``.

        Raises:
            ConfigError: no ``w`` has it.
        """

    def project_(self, w: Tensor) -> None:
        """Puts ``w`` back into its set, in place, after an optimiser step; by default every ``w`` is in it."""
        return


class Free(Constraint):
    """Allows any coefficient, negative ones too: ``phi(w) = w``."""

    def __call__(self, w: Tensor) -> Tensor:
        """Returns ``w`` itself as the coefficients."""
        return w

    def raw(self, coefficient: float) -> float:
        """Returns the coefficient itself as the raw parameter."""
        return coefficient


class Interval(Constraint):
    """Shared by the constraints that hold coefficients in [low, high].

    Args:
        low: the smallest coefficient.
        high: the largest coefficient.

    Raises:
        ConfigError: low is not below high.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0) -> None:
        if not low < high:
            raise ConfigError(f"{type(self).__name__}: low must be below high, got low={low} and high={high}")
        self.low, self.high = low, high

    def raw(self, coefficient: float) -> float:
        """Returns the coefficient itself as the raw parameter, when it lies in the interval."""
        if not self.low <= coefficient <= self.high:
            raise ConfigError(
                f"{type(self).__name__}: the initial coefficient {coefficient} is outside [{self.low}, {self.high}]",
                todo="change init, or the interval",
            )
        return coefficient


class Clamp(Interval):
    """Clamped inside the forward pass, as AdaMerging's code does: past a bound the gradient is 0 and ``w`` may stay there.

    Reference: AdaMerging (Yang et al., 2024), https://arxiv.org/abs/2310.02575.
    """

    def __call__(self, w: Tensor) -> Tensor:
        """Returns the coefficients ``min(max(w, low), high)``."""
        return w.clamp(self.low, self.high)


class Projection(Interval):
    """Projected after each optimiser step: same interval as ``Clamp``, and the gradient lives on at the bounds."""

    def __call__(self, w: Tensor) -> Tensor:
        """Returns ``w`` itself as the coefficients, since ``w`` stays in the interval."""
        return w

    def project_(self, w: Tensor) -> None:
        """Clamps ``w`` to the interval in place."""
        w.clamp_(self.low, self.high)


class Sigmoid(Constraint):
    """``1 / (1 + exp(-w))``: coefficients in (0, 1).

    Reference: Expert Merging (Zhang et al., 2025), https://arxiv.org/abs/2509.25712.
    """

    def __call__(self, w: Tensor) -> Tensor:
        """Returns the coefficients ``1 / (1 + exp(-w))``."""
        return torch.sigmoid(w)

    def raw(self, coefficient: float) -> float:
        """Returns ``log(c / (1 - c))``, the raw parameter of coefficient ``c``."""
        if not 0 < coefficient < 1:
            raise ConfigError(f"Sigmoid: the initial coefficient must lie strictly in (0, 1), got {coefficient}")
        return math.log(coefficient / (1 - coefficient))


class Softmax(Constraint):
    """Softmax over the experts: the coefficients of each group are positive and sum to 1; all start at 1 / experts."""

    def __call__(self, w: Tensor) -> Tensor:
        """Returns the coefficients, ``softmax(w)`` over dimension 0, the experts."""
        return torch.softmax(w, dim=0)

    def raw(self, coefficient: float) -> float:
        """Returns 0: experts that all have the same initial coefficient share equally; no other one can be had."""
        return 0.0
