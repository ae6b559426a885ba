"""Operations: random changes of colours and geometry, as RandAugment has them, each of a random strength."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from adamerge.backbones import Inputs
from adamerge.errors import ConfigError
from adamerge.objectives.views import FlipAndShift, View, images_of, numbers_on, uniform

GREY = 128.0


class RandomOperations(View):
    """A weak view, then random operations of random strength on colours or geometry, then a grey square.

    The operations: brightness, contrast, saturation, posterising, solarising, rotation, shearing and scaling; a sample may
    get the same one twice.

    Args:
        operations: per sample.
        strength: largest, as a share of what RandAugment calls its full magnitude.
        square: largest side of the grey square, as a share of height and width.
        before: the weak view.

    Raises:
        ConfigError: a number is out of range; in use: the inputs are not images.

    Reference: RandAugment (Cubuk et al., 2020), https://arxiv.org/abs/1909.13719, as FixMatch uses it for strong
    augmentation (Sohn et al., 2020), https://arxiv.org/abs/2001.07685.
    """

    def __init__(
        self, operations: int = 2, strength: float = 1.0, square: float = 0.5, before: View | None = None
    ) -> None:
        if operations < 0 or not (0 <= strength <= 1 and 0 <= square <= 1):
            raise ConfigError(
                "RandomOperations: operations must be at least 0, strength and square must be shares",
                got=f"{operations}, {strength} and {square}",
            )
        self.operations, self.strength, self.square = operations, strength, square
        self.before = before if before is not None else FlipAndShift()

    def __call__(self, inputs: Inputs, seeds: Tensor) -> Tensor:
        """Returns changed images of the same shape, uint8 ``(samples, 3, height, width)``."""
        images_of(self, inputs)
        images = images_of(self, self.before(inputs, seeds)).float()
        for turn in range(self.operations):
            chosen = (uniform(seeds, 10 + 2 * turn) * len(OPERATIONS)).long()
            strengths = self.strength * (2 * numbers_on(images.device, seeds, 11 + 2 * turn) - 1)
            for number, operation in enumerate(OPERATIONS):
                those = (chosen == number).nonzero()[:, 0].to(images.device, non_blocking=True)
                if len(those):
                    images[those] = operation(images[those], strengths[those, None, None, None])
        return self._cut(images, seeds).round().clamp(0, 255).to(torch.uint8)

    def _cut(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Covers a random square of each image, of a side of up to ``square``, with grey."""
        inside = torch.ones((), dtype=torch.bool, device=images.device)
        for axis, size in enumerate(images.shape[2:]):
            half = self.square * size * numbers_on(images.device, seeds, 3) / 2
            places = torch.arange(size, device=images.device) + 0.5
            near = (places - size * numbers_on(images.device, seeds, 4 + axis)[:, None]).abs() < half[:, None]
            inside = inside & (near[:, None, :, None] if axis == 0 else near[:, None, None, :])
        return torch.where(inside, GREY, images)


# each: fp32 images (samples, channels, height, width) of values 0 to 255, strengths (samples, 1, 1, 1) in [-1, 1]


def brightness(images: Tensor, strengths: Tensor) -> Tensor:
    """Makes images darker or brighter by up to 0.9 times."""
    return images * (1 + 0.9 * strengths)


def contrast(images: Tensor, strengths: Tensor) -> Tensor:
    """Moves values away from, or towards, the image's mean."""
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (1 + 0.9 * strengths)


def saturation(images: Tensor, strengths: Tensor) -> Tensor:
    """Moves colours away from, or towards, each pixel's mean over the channels."""
    grey = images.mean(dim=1, keepdim=True)
    return grey + (images - grey) * (1 + 0.9 * strengths)


def posterise(images: Tensor, strengths: Tensor) -> Tensor:
    """Rounds values down to steps of up to 64."""
    step = 2 ** (6 * strengths.abs()).round()
    return (images.clamp(0, 255) / step).floor() * step


def solarise(images: Tensor, strengths: Tensor) -> Tensor:
    """Inverts the values that are above a threshold."""
    images = images.clamp(0, 255)
    return torch.where(images > 255 * (1 - strengths.abs()), 255 - images, images)


def rotate(images: Tensor, strengths: Tensor) -> Tensor:
    """Rotates images by up to 30 degrees."""
    angle = strengths.flatten() * math.pi / 6
    return _moved(images, torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1))


def shear(images: Tensor, strengths: Tensor) -> Tensor:
    """Shifts rows sideways by up to 0.3 of their distance from the middle."""
    slope, one = 0.3 * strengths.flatten(), torch.ones_like(strengths).flatten()
    return _moved(images, torch.stack([one, slope, torch.zeros_like(one), one], dim=1))


def scale(images: Tensor, strengths: Tensor) -> Tensor:
    """Makes images smaller or larger by up to 0.3 times."""
    factor = 1 + 0.3 * strengths.flatten()
    return _moved(images, torch.stack([factor, torch.zeros_like(factor), torch.zeros_like(factor), factor], dim=1))


def _moved(images: Tensor, matrices: Tensor) -> Tensor:
    """Maps each image through its matrix ``(2, 2)`` about the middle; the border is repeated."""
    theta = torch.nn.functional.pad(matrices.view(-1, 2, 2), (0, 1))
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    return torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    brightness, contrast, saturation, posterise, solarise, rotate, shear, scale,
)  # fmt: skip
