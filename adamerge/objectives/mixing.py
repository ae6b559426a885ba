"""Mixing: views that blend each sample with another one of its task."""

from __future__ import annotations

import torch
from torch import Tensor

from adamerge.backbones import Inputs
from adamerge.deltas.splitmix64 import mixed
from adamerge.errors import ConfigError
from adamerge.objectives.views import View, images_of, uniform

TRIES = 32
"""Draws of two numbers, of which one in two at least makes a weight: none does less than once in 4e9 samples."""


class MixInputs(View):
    """Images blended with another one of the task's batch: ``l x + (1 - l) x'``, ``l ~ Beta(alpha, alpha)``.

    The samples of a task that a process has in a step stand in a circle, in an order that their seeds decide; each is blended
    with the next, so that each is the other one of one sample, and never its own unless it is alone. So a view is a
    function of all of the task's samples of the step and of no other thing: not of their order in the batch, nor of
    micro-batches. With several processes each blends within its own samples.

    There are no labels to blend: the expert is asked on the same blend.

    Args:
        alpha: of the weights' distribution: 1 is even between 0 and 1, a small one leaves most samples nearly alone.

    Raises:
        ConfigError: a number is out of range; in use: the inputs are not images.

    Reference: mixup (Zhang et al., 2018), https://arxiv.org/abs/1710.09412; with a teacher that sees the blend, Beyer et al.,
    2022, https://arxiv.org/abs/2106.05237.
    """

    def __init__(self, alpha: float = 1.0) -> None:
        if not 0 < alpha <= 1:
            raise ConfigError(f"MixInputs: alpha must be above 0 and at most 1, got {alpha}")
        self.alpha = alpha

    def __call__(self, inputs: Inputs, seeds: Tensor) -> Tensor:
        """Returns blends of the same shape, uint8 ``(samples, channels, height, width)``."""
        images = images_of(self, inputs)
        partners = partners_of(seeds).to(images.device, non_blocking=True)
        weights = self.weights(seeds).to(images.device, non_blocking=True)[:, None, None, None]
        others = images.index_select(0, partners).float()
        return (others + weights * (images.float() - others)).round().to(torch.uint8)

    def weights(self, seeds: Tensor) -> Tensor:
        """Returns each sample's own share l of its blend, fp32 ``(samples,)``.

        Of ``x = u^(1/alpha)`` and ``y = v^(1/alpha)``, u and v even, ``x / (x + y)`` is Beta(alpha, alpha) where
        ``x + y <= 1`` (Joehnk, Metrika 8, 1964): the first such pair of ``TRIES`` counts, else l = 1/2.
        """
        x, y = (
            torch.stack([uniform(seeds, 2 * turn + first) for turn in range(TRIES)]).double() ** (1 / self.alpha)
            for first in (1, 2)
        )
        fits = (x + y <= 1) & (x + y > 0)
        first = fits.int().argmax(dim=0, keepdim=True)
        x, y = x.gather(0, first)[0], y.gather(0, first)[0]
        return torch.where(fits.any(dim=0), x / (x + y), 0.5).float()


def partners_of(seeds: Tensor) -> Tensor:
    """Returns the place of the sample that each one is blended with, int64 ``(samples,)``: the next of a random circle."""
    circle = mixed(seeds * 31 + 1).argsort(stable=True)
    return torch.empty_like(circle).index_copy_(0, circle, circle.roll(-1))
