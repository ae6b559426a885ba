"""Affine and photometric views: the formula pixel by pixel, in float64, and what they do where each number acts alone."""

import math

import pytest
import torch

from adamerge.errors import ConfigError
from adamerge.objectives import AffinePhotometric
from adamerge.objectives.affine_photometric import noise_of
from adamerge.objectives.views import seeds_of

from .test_views import IMAGES, SEEDS, splitmix

STILL = {"degrees": 0.0, "scale": 0.0, "shift": 0.0, "contrast": 0.0, "brightness": 0.0, "noise": 0.0}


def number(seed: int, place: int) -> float:
    """The ``place``-th even number of a seed, between -1 and 1."""
    return (splitmix(seed * 31 + place + 1) & 0xFFFFFF) / 2**23 - 1


def sampled(image, y: float, x: float):
    """The image's values at a place between pixels, its border repeated."""
    height, width = image.shape[1:]
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = min(int(y), height - 2), min(int(x), width - 2)
    down, right = y - top, x - left
    return (
        (1 - down) * (1 - right) * image[:, top, left]
        + (1 - down) * right * image[:, top, left + 1]
        + down * (1 - right) * image[:, top + 1, left]
        + down * right * image[:, top + 1, left + 1]
    )


@pytest.mark.parametrize(("height", "width"), [(16, 16), (10, 16)])
def test_each_pixel_is_the_formulas(height, width):
    """Rotation, size and shifts of pixels about the middle, also of images that are not square."""
    view, images = AffinePhotometric(degrees=25, scale=0.2, shift=0.1, noise=0.0), IMAGES[:12, :, :height, :width]
    found = view(images, SEEDS[:12])
    for i in range(12):
        seed, image = int(SEEDS[i]), images[i].double()
        angle, size = math.radians(25) * number(seed, 0), 1 + 0.2 * number(seed, 1)
        right, down = 0.1 * width * number(seed, 2), 0.1 * height * number(seed, 3)
        mean, contrast, brightness = image.mean(), 1 + 0.15 * number(seed, 4), 0.15 * number(seed, 5)
        for row, column in ((0, 0), (3, 11), (height // 2, width // 2), (height - 1, 2)):
            y, x = row - (height - 1) / 2, column - (width - 1) / 2
            from_x = (math.cos(angle) * x - math.sin(angle) * y) / size + right + (width - 1) / 2
            from_y = (math.sin(angle) * x + math.cos(angle) * y) / size + down + (height - 1) / 2
            value = mean + contrast * (sampled(image, from_y, from_x) - mean) + 255 * brightness
            # rounded to a whole number; coordinates in fp32 are off by 1e-5 of a pixel, whose values are up to 255
            assert (found[i, :, row, column].double() - value.clamp(0, 255)).abs().max() <= 0.5 + 0.01


def test_where_nothing_changes_it_is_the_image():
    assert torch.equal(AffinePhotometric(**STILL)(IMAGES, SEEDS), IMAGES)
    for name, value in STILL.items():
        assert not torch.equal(
            AffinePhotometric(**{**STILL, name: 0.2 + 10 * (value == "degrees")})(IMAGES, SEEDS), IMAGES
        )


def test_noise_is_the_published_hashs_nearly_normal_and_independent():
    seeds = seeds_of(0, 3, torch.arange(400))
    noise = noise_of(seeds, torch.Size([3, 8, 8])).double()
    for i, place in ((0, 0), (7, 191), (399, 100)):
        bits = splitmix(splitmix(int(seeds[i]) * 31 + 8 + 1) * 31 + place + 1)
        total = sum((bits >> (16 * piece)) & 0xFFFF for piece in range(4))
        assert noise.view(400, -1)[i, place] == pytest.approx((total - 2 * 0xFFFF) / 65536 * math.sqrt(3), abs=1e-6)
    count = noise.numel()
    assert abs(noise.mean()) < 5 / math.sqrt(count) and abs(noise.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((noise**4).mean() - (3 - 1.2 / 4)) < 0.1, "the fourth moment of four even numbers"
    flat = noise.view(400, -1)
    assert abs((flat[:, 1:] * flat[:, :-1]).mean()) < 5 / math.sqrt(count)
    assert abs((flat[1:] * flat[:-1]).mean()) < 5 / math.sqrt(count)


def test_noise_has_the_size_that_is_asked_for():
    grey = torch.full((64, 3, 16, 16), 128, dtype=torch.uint8)
    found = AffinePhotometric(**{**STILL, "noise": 0.03})(grey, SEEDS).double() - 128
    assert found.std() == pytest.approx(0.03 * 255, rel=0.02) and abs(found.mean()) < 0.1


@pytest.mark.parametrize("arguments", [{"degrees": -1.0}, {"degrees": 181.0}, {"scale": 1.0}, {"noise": -0.1}])
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ConfigError, match="AffinePhotometric"):
        AffinePhotometric(**arguments)
