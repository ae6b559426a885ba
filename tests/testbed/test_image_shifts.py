"""The shifts: each does what it says, to the pixel where that can be said, and the same for the same seed."""

import pytest
import torch

from adamerge.testbed import image_shifts as shifts
from adamerge.testbed.image_tasks import IMAGE_TASKS

SIZE = 56


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_images(count: int = 6, channels: int = 3) -> torch.Tensor:
    return torch.rand(count, channels, SIZE, SIZE, generator=seeded(7))


NOTHING = {
    "rotate": shifts.rotate(0, 0),
    "shear": shifts.shear(0, 0),
    "scale": shifts.scale(1, 1),
    "mix_channels": shifts.mix_channels(0),
    "contrast": shifts.contrast(1),
    "blur": shifts.blur(0.1),
    "noise": shifts.noise(0),
    "stripes": shifts.stripes(14, 0),
    "chain": shifts.chain([]),
}
SOMETHING = {
    "rotate": shifts.rotate(25, 40),
    "shear": shifts.shear(0.45, 0.7),
    "scale": shifts.scale(0.6, 0.75, 0.3),
    "mix_channels": shifts.mix_channels(0.4),
    "contrast": shifts.contrast(-1),
    "blur": shifts.blur(2),
    "noise": shifts.noise(0.12),
    "stripes": shifts.stripes(14, 0.6),
    "chain": shifts.chain([shifts.stripes(14, 0.6), shifts.noise(0.12)]),
}
DRAWN = {"rotate", "shear", "scale", "noise", "stripes", "chain"}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NOTHING)
def test_a_shift_by_nothing_is_the_identity(name, channels):
    images = noise_images(channels=channels)
    assert torch.allclose(NOTHING[name](images, seeded()), images, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", SOMETHING)
def test_shape_range_and_determinism(name, channels):
    images = noise_images(channels=channels)
    before = images.clone()
    shifted = SOMETHING[name](images, seeded(3))
    assert torch.equal(images, before), "the clean images are needed again"
    assert shifted.shape == images.shape and shifted.dtype == images.dtype
    assert shifted.min() >= 0 and shifted.max() <= 1 + 1e-6
    assert torch.equal(SOMETHING[name](images, seeded(3)), shifted)
    assert torch.equal(SOMETHING[name](images, seeded(4)), shifted) is (name not in DRAWN)
    if (name, channels) != ("mix_channels", 1):
        assert (shifted - images).abs().mean() > 0.02


@pytest.mark.parametrize("name", IMAGE_TASKS)
def test_the_tasks_shifts_keep_shape_and_range(name):
    images = noise_images(channels=3 if name == "photos" else 1)
    shifted = IMAGE_TASKS[name].shift(images, seeded())
    assert shifted.shape == images.shape and shifted.min() >= 0 and shifted.max() <= 1 + 1e-6
    assert (shifted - images).abs().mean() > 0.02


def test_rotations_go_clockwise():
    images = noise_images()
    assert torch.allclose(shifts.rotate(90, 90)(images, seeded()), images.rot90(-1, (2, 3)), atol=1e-4)
    assert torch.allclose(shifts.rotate(180, 180)(images, seeded()), images.flip(2, 3), atol=1e-4)
    assert torch.allclose(shifts.rotate(-90, -90)(images, seeded()), images.rot90(1, (2, 3)), atol=1e-4)


def test_every_image_has_its_own_angle():
    images = noise_images(1).repeat(4, 1, 1, 1)
    turned = shifts.rotate(0, 90)(images, seeded())
    assert len({tuple(image.flatten().tolist()) for image in turned}) == 4


def test_shear_moves_the_top_sideways_by_its_share_of_the_height():
    line = torch.zeros(1, 1, SIZE, SIZE)
    line[..., 27:29] = 1
    slanted = shifts.shear(0.5, 0.5)(line, seeded())[0, 0]
    places = (slanted * torch.arange(SIZE)).sum(1) / slanted.sum(1)
    assert float(places[0] - places[-1]) == pytest.approx(0.5 * (SIZE - 1), abs=0.5)
    assert torch.allclose(places[SIZE // 2 - 1] + places[SIZE // 2], torch.tensor(2 * 27.5), atol=0.5)


def test_scale_shrinks_and_moves():
    square = torch.zeros(20, 1, SIZE, SIZE)
    square[:, :, 18:38, 18:38] = 1
    small = shifts.scale(0.5, 0.5)(square, seeded())
    assert torch.allclose(small.sum((1, 2, 3)), torch.full((20,), 100.0), rtol=0.05)
    assert torch.allclose(small[..., 23:33, 23:33], torch.ones(1), atol=0.3)
    moved = shifts.scale(0.5, 0.5, 0.3)(square, seeded())
    columns = (moved.sum((1, 2)) * torch.arange(SIZE)).sum(1) / moved.sum((1, 2, 3)) - 27.5
    assert columns.abs().max() <= 0.3 * SIZE / 2 + 0.5 and columns.std() > 2


def test_colours_move_one_channel_on():
    images = noise_images()
    assert torch.equal(shifts.mix_channels(1)(images, seeded()), images[:, [1, 2, 0]])
    mixed = shifts.mix_channels(0.4)(images, seeded())
    assert torch.allclose(mixed[:, 2], 0.6 * images[:, 2] + 0.4 * images[:, 0])
    grey = noise_images(channels=1)
    assert torch.allclose(shifts.mix_channels(0.4)(grey, seeded()), grey)


def test_contrast():
    images = noise_images()
    assert torch.allclose(shifts.contrast(-1)(images, seeded()), 1 - images, atol=1e-6)
    assert torch.equal(shifts.contrast(0)(images, seeded()), torch.full_like(images, 0.5))
    assert shifts.contrast(1, 0.25)(images, seeded()).max() == 1, "cut off, not wrapped"


def test_blur_keeps_flat_images_and_spreads_a_point_evenly():
    flat = torch.full((2, 3, SIZE, SIZE), 0.7)
    assert torch.allclose(shifts.blur(3)(flat, seeded()), flat, atol=1e-5)
    point = torch.zeros(1, 1, SIZE, SIZE)
    point[0, 0, 28, 28] = 1
    spread = shifts.blur(2)(point, seeded())[0, 0]
    assert spread.sum() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(spread, spread.T, atol=1e-7) and spread.argmax() == 28 * SIZE + 28
    assert float((spread.sum(0) * (torch.arange(SIZE) - 28.0) ** 2).sum()) == pytest.approx(4, rel=0.05)


def test_noise_has_the_grain_of_a_final_pixel():
    grain = shifts.noise(0.1)(torch.full((4, 1, SIZE, SIZE), 0.5), seeded()) - 0.5
    blocks = grain.unfold(2, 2, 2).unfold(3, 2, 2).flatten(-2)
    assert torch.equal(blocks, blocks[..., :1].expand_as(blocks))
    assert float(blocks[..., 0].std()) == pytest.approx(0.1, rel=0.1) and abs(float(grain.mean())) < 0.01


def test_stripes_cover_half_of_every_period_and_begin_anywhere():
    striped = shifts.stripes(14, 1.0)(torch.ones(40, 1, SIZE, SIZE), seeded())[:, 0]
    assert torch.equal(striped, striped[..., :1].expand_as(striped)), "across the whole width"
    covered = striped[..., 0] == 0.5
    assert (covered.sum(1) == SIZE // 2).all() and torch.equal(covered[:, 14:], covered[:, :-14])
    assert len({tuple(rows.tolist()) for rows in covered}) > 5
    assert torch.allclose(shifts.stripes(14, 0.6)(torch.ones(1, 1, SIZE, SIZE), seeded()).min(), torch.tensor(0.7))


def test_a_chain_is_one_after_the_other():
    images, parts = noise_images(), [shifts.contrast(-1), shifts.noise(0.1), shifts.stripes(14, 0.5)]
    generator, expected = seeded(5), images
    for part in parts:
        expected = part(expected, generator)
    assert torch.equal(shifts.chain(parts)(images, seeded(5)), expected)
