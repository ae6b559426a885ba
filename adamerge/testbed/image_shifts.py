"""The shifts that make tasks out of clean images.

Each maps floats in [0, 1] of shape (n, channels, 56, 56) to the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from adamerge.testbed.image_sources import affine, uniform

Shift = Callable[[Tensor, torch.Generator], Tensor]


def rotate(low: float, high: float) -> Shift:
    """Turn clockwise by ``low`` to ``high`` degrees."""
    return partial(_rotate, low, high)


def _rotate(low: float, high: float, images: Tensor, generator: torch.Generator) -> Tensor:
    angle = torch.deg2rad(uniform(len(images), low, high, generator))
    matrices = torch.zeros(len(images), 2, 3)
    matrices[:, 0, 0], matrices[:, 1, 1] = angle.cos(), angle.cos()
    matrices[:, 0, 1], matrices[:, 1, 0] = angle.sin(), -angle.sin()
    return affine(images, matrices)


def shear(low: float, high: float) -> Shift:
    """Slant sideways: the top moves by ``low`` to ``high`` of the height."""
    return partial(_shear, low, high)


def _shear(low: float, high: float, images: Tensor, generator: torch.Generator) -> Tensor:
    matrices = torch.eye(2, 3).repeat(len(images), 1, 1)
    matrices[:, 0, 1] = uniform(len(images), low, high, generator)
    return affine(images, matrices)


def scale(low: float, high: float, offset: float = 0.0) -> Shift:
    """Shrink to ``low`` to ``high`` of the size (or grow, above 1), then move by up to ``offset`` of half the width."""
    return partial(_scale, low, high, offset)


def _scale(low: float, high: float, offset: float, images: Tensor, generator: torch.Generator) -> Tensor:
    matrices = torch.eye(2, 3).repeat(len(images), 1, 1) / uniform(len(images), low, high, generator)[:, None, None]
    matrices[:, :, 2] = (torch.rand(len(images), 2, generator=generator) * 2 - 1) * offset * matrices[:, :1, 0]
    return affine(images, matrices)


def mix_channels(weight: float) -> Shift:
    """Blend each colour channel with the next one: ``weight`` 1 turns red, green, blue into green, blue, red."""
    return partial(_mix_channels, weight)


def _mix_channels(weight: float, images: Tensor, generator: torch.Generator) -> Tensor:
    return (1 - weight) * images + weight * images.roll(-1, dims=1)


def contrast(factor: float, offset: float = 0.0) -> Shift:
    """Scale the distance from mid-grey; a negative ``factor`` inverts."""
    return partial(_contrast, factor, offset)


def _contrast(factor: float, offset: float, images: Tensor, generator: torch.Generator) -> Tensor:
    return (0.5 + factor * (images - 0.5) + offset).clamp(0, 1)


def blur(sigma: float) -> Shift:
    """Gaussian blur, ``sigma`` in pixels of the 56 x 56 canvas."""
    return partial(_blur, sigma)


def _blur(sigma: float, images: Tensor, generator: torch.Generator) -> Tensor:
    radius = int(3 * sigma + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).repeat(images.shape[1], 1, 1, 1)
    padded = F.pad(images, [radius] * 4, mode="replicate")
    channels = images.shape[1]
    return F.conv2d(F.conv2d(padded, kernel, groups=channels), kernel.transpose(2, 3), groups=channels)


def noise(sigma: float) -> Shift:
    """Gaussian noise with the grain of one final pixel (two by two of the canvas)."""
    return partial(_noise, sigma)


def _noise(sigma: float, images: Tensor, generator: torch.Generator) -> Tensor:
    count, channels, height, width = images.shape
    grain = torch.randn(count, channels, height // 2, width // 2, generator=generator) * sigma
    return (images + F.interpolate(grain, scale_factor=2.0, mode="nearest")).clamp(0, 1)


def stripes(period: int, opacity: float) -> Shift:
    """Horizontal grey bars, half of each ``period`` canvas rows, at a random phase."""
    return partial(_stripes, period, opacity)


def _stripes(period: int, opacity: float, images: Tensor, generator: torch.Generator) -> Tensor:
    phase = torch.randint(period, (len(images), 1), generator=generator)
    bars = ((torch.arange(images.shape[2]) + phase) % period < period // 2).float() * opacity
    return images + bars[:, None, :, None] * (0.5 - images)


def chain(shifts: Sequence[Shift]) -> Shift:
    """One shift after the other."""
    return partial(_chain, tuple(shifts))


def _chain(shifts: Sequence[Shift], images: Tensor, generator: torch.Generator) -> Tensor:
    for shift in shifts:
        images = shift(images, generator)
    return images
