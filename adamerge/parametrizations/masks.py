"""Masks: which share of each weight's update is kept, from the logits that were learned for it."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from adamerge.errors import ConfigError
from adamerge.parametrizations.hashed_noise import logistic


class Mask(ABC):
    """Computes the mask ``m`` of ``m / mean(m)``, element by element from logits ``x``."""

    @abstractmethod
    def __call__(self, name: str, logits: Tensor, temperature: float) -> Tensor:
        """Returns a new tensor of masks in [0, 1], fp32, from the flat logits of tensor ``name``."""

    def slope(self, mask: Tensor, temperature: float) -> Tensor | None:
        """Returns ``dm/dx`` as a function of ``m``; None where it is 0 everywhere."""
        return None


class SoftMask(Mask):
    """One sample of a relaxed Bernoulli: ``m = sigmoid((log u - log(1 - u) + x) / temperature)``.

    Args:
        seed: of ``u``, with the tensor's name.
        draw: which sample of this seed; None for the one that stands for all, others are for searches.

    Reference: The Concrete Distribution (Maddison et al., 2017), https://arxiv.org/abs/1611.00712.
    """

    def __init__(self, seed: int = 0, draw: int | None = None) -> None:
        self.seed, self.draw = seed, draw

    def __call__(self, name: str, logits: Tensor, temperature: float) -> Tensor:
        """Returns the relaxed sample of the mask, from the flat logits of tensor ``name``."""
        noise = logistic((self.seed, self.draw, name), logits.numel(), logits.device)
        return noise.add_(logits).div_(temperature).sigmoid_()

    def slope(self, mask: Tensor, temperature: float) -> Tensor:
        """Returns ``dm/dx = m (1 - m) / temperature``."""
        return torch.addcmul(mask, mask, mask, value=-1).div_(temperature)


class BinaryMask(Mask):
    """One sample of 0 or 1: the relaxed sample of the same seed, above 0.5 or not; 1 with probability ``sigmoid(x)``.

    Args:
        seed: of the sample.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, name: str, logits: Tensor, temperature: float) -> Tensor:
        """Returns the binary sample of the mask; the temperature does not matter."""
        return (logistic((self.seed, None, name), logits.numel(), logits.device).add_(logits) > 0).float()


class HardMask(Mask):
    """0 or 1, without noise: ``sigmoid(x) >= threshold``, so that weights which nothing moved from 0 are kept.

    Args:
        threshold: the probability from which a weight's update is kept.

    Raises:
        ConfigError: it is no probability.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        if not 0 <= threshold <= 1:
            raise ConfigError(f"HardMask: threshold must lie in [0, 1], got {threshold}")
        self.threshold = threshold

    def __call__(self, name: str, logits: Tensor, temperature: float) -> Tensor:
        """Returns 1 where the probability reaches the threshold, else 0."""
        return (logits.sigmoid() >= self.threshold).float()


class ExpectedMask(Mask):
    """The probabilities themselves, ``m = sigmoid(x)``: the mean of the binary sample, and near that of the relaxed one."""

    def __call__(self, name: str, logits: Tensor, temperature: float) -> Tensor:
        """Returns the probabilities ``sigmoid(x)`` as the mask."""
        return logits.sigmoid()

    def slope(self, mask: Tensor, temperature: float) -> Tensor:
        """Returns ``dm/dx = m (1 - m)``."""
        return torch.addcmul(mask, mask, mask, value=-1)
