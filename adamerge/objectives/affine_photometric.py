"""Affine and photometric views: images turned, scaled, shifted, in another light and with noise; nothing is mirrored."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adamerge.backbones import Inputs
from adamerge.deltas.splitmix64 import mixed
from adamerge.errors import ConfigError
from adamerge.objectives.views import View, images_of, uniform

WHITE = 255.0
NOISE = 8  # the number of the noise's hash; those below it are of one number a sample
PIECES = 4
"""Of 16 bits, whose sum makes a pixel's noise: of variance 4/12, at most 3.46 standard deviations from 0."""


class AffinePhotometric(View):
    """Images rotated, scaled and shifted by one bilinear sampling, then of other contrast and brightness, and with noise.

    Each sample draws angle, scale, both shifts, contrast c and brightness b evenly from their ranges. With m the mean of the
    sample's own pixels and n noise of variance 1, a value v between 0 and 255 becomes
    ``m + (1 + c) (v - m) + 255 b + 255 noise n``, rounded and clamped. What comes from outside is the border, repeated. The
    noise is a sum of four even numbers, nearly normal, and the same bits on every device.

    Args:
        degrees: largest rotation, in both directions.
        scale: largest change of size, as a share: 0.1 is 0.9 to 1.1 times.
        shift: largest shift, as a share of height and width.
        contrast: largest c, in size.
        brightness: largest b, in size.
        noise: its standard deviation, as a share of the range of values.

    Raises:
        ConfigError: a number is out of range; in use: the inputs are not images.

    Reference: Spatial Transformer Networks (Jaderberg et al., 2015), https://arxiv.org/abs/1506.02025, for the sampling;
    distillation on changed inputs, of which the teacher sees the same ones: Beyer et al., 2022,
    https://arxiv.org/abs/2106.05237.
    """

    def __init__(
        self,
        *,
        degrees: float = 10.0,
        scale: float = 0.1,
        shift: float = 0.08,
        contrast: float = 0.15,
        brightness: float = 0.15,
        noise: float = 0.03,
    ) -> None:
        if not 0 <= degrees <= 180:
            raise ConfigError(f"AffinePhotometric: degrees must be between 0 and 180, got {degrees}")
        shares = {"scale": scale, "shift": shift, "contrast": contrast, "brightness": brightness, "noise": noise}
        for name, value in shares.items():
            if not 0 <= value < 1:
                raise ConfigError(f"AffinePhotometric: {name} must be a share below 1, got {value}")
        self.degrees, self.scale, self.shift = degrees, scale, shift
        self.contrast, self.brightness, self.noise = contrast, brightness, noise

    def __call__(self, inputs: Inputs, seeds: Tensor) -> Tensor:
        """Returns changed images of the same shape, uint8 ``(samples, channels, height, width)``."""
        images = images_of(self, inputs)
        numbers = torch.stack([2 * uniform(seeds, number) - 1 for number in range(6)])
        factors = torch.cat([self._matrices(numbers, images.shape[2] / images.shape[3]), numbers[4:].T], dim=1)
        factors = factors.to(images.device, non_blocking=True)[:, :, None, None]  # one transfer of all numbers
        mean = images.sum(dim=(1, 2, 3), dtype=torch.int64, keepdim=True).float() / images[0].numel()
        grid = _grid(factors[:, :6, 0], images.shape[2], images.shape[3])
        moved = torch.nn.functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
        lit = mean + (1 + self.contrast * factors[:, 6:7]) * (moved - mean) + WHITE * self.brightness * factors[:, 7:8]
        if self.noise:
            lit = lit + WHITE * self.noise * noise_of(seeds.to(images.device, non_blocking=True), images.shape[1:])
        return lit.round().clamp(0, WHITE).to(torch.uint8)

    def _matrices(self, numbers: Tensor, ratio: float) -> Tensor:
        """Returns where each image's points come from, ``(samples, 6)``: rows of a 2 x 3 matrix on coordinates of -1 to 1.

        Args:
            numbers: ``(6, samples)`` in [-1, 1): angle, scale and shifts are the first four.
            ratio: height by width, by which a rotation is one of pixels and not of coordinates.
        """
        angle, size = numbers[0] * math.radians(self.degrees), 1 + self.scale * numbers[1]
        cosine, sine = angle.cos() / size, angle.sin() / size
        right, down = 2 * self.shift * numbers[2], 2 * self.shift * numbers[3]  # a side is 2 long
        return torch.stack([cosine, -sine * ratio, right, sine / ratio, cosine, down], dim=1)


def noise_of(seeds: Tensor, shape: torch.Size) -> Tensor:
    """Returns numbers of mean 0 and variance 1 for each element of each sample, fp32 ``(samples, *shape)``.

    Args:
        seeds: int64 ``(samples,)``, on the device of the result.
        shape: of a sample.
    """
    places = torch.arange(shape.numel(), device=seeds.device)
    bits = mixed(mixed(seeds * 31 + NOISE + 1)[:, None] * 31 + places + 1)
    total = sum(((bits >> (16 * piece)) & 0xFFFF for piece in range(1, PIECES)), bits & 0xFFFF)
    centred = total - PIECES * 0xFFFF // 2  # a whole number
    return (centred.float() * (math.sqrt(12 / PIECES) / 0x10000)).view(len(seeds), *shape)


def _grid(matrices: Tensor, height: int, width: int) -> Tensor:
    """Returns the points that pixels come from, ``(samples, height, width, 2)``; by products alone, which no device rounds.

    Args:
        matrices: ``(samples, 6, 1)``.
        height: of the images.
        width: of the images.
    """
    across = (2 * torch.arange(width, device=matrices.device) + 1) / width - 1
    down = (2 * torch.arange(height, device=matrices.device) + 1) / height - 1
    rows = [
        matrices[:, first, :, None] * across
        + (matrices[:, first + 1, :, None] * down[:, None] + matrices[:, first + 2, :, None])
        for first in (0, 3)
    ]
    return torch.stack(rows, dim=-1)
