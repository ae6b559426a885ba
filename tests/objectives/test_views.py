"""Views: functions of sample and seed alone, exact where they move pixels, and of the size they say."""

import math

import numpy
import pytest
import torch
from PIL import Image

from adamerge.errors import ConfigError
from adamerge.objectives import AffinePhotometric, Composed, CropAndFlip, FlipAndShift, RandomOperations, Unchanged
from adamerge.objectives.views import seeds_of, uniform

IMAGES = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SEEDS = seeds_of(0, 3, torch.arange(64))


def splitmix(value: int) -> int:
    """The published finaliser, on Python's integers."""
    mask = (1 << 64) - 1
    value &= mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def test_seeds_and_numbers_are_those_of_the_published_hash():
    for seed, step, index, purpose in ((0, 0, 0, 0), (5, 17, 123456, 2), (2**40, 3, 9, 1)):
        expected = seed
        for part in (purpose, step, index):
            expected = splitmix(expected * 31 + part + 1)
        found = seeds_of(seed, step, torch.tensor([index]), purpose)
        assert int(found) % 2**64 == expected
        for number in (0, 7):
            assert float(uniform(found, number)) == (splitmix(expected * 31 + number + 1) & 0xFFFFFF) / 2**24


def test_numbers_are_uniform_and_independent():
    many = torch.arange(40000)
    rows = [uniform(seeds_of(0, 3, many), 0), uniform(seeds_of(0, 3, many), 1), uniform(seeds_of(0, 4, many), 0)]
    rows += [
        uniform(seeds_of(1, 3, many), 0),
        uniform(seeds_of(0, 3, many + 1), 0),
        uniform(seeds_of(0, 3, many, 1), 0),
    ]
    table = torch.stack(rows)
    assert (table >= 0).all() and (table < 1).all()
    assert (table.mean(1) - 0.5).abs().max() < 5 / math.sqrt(12 * 40000)
    assert ((12 * table.var(1)) - 1).abs().max() < 0.03
    assert (torch.corrcoef(table) - torch.eye(6)).abs().max() < 5 / math.sqrt(40000)


@pytest.mark.parametrize(
    "view",
    [
        Unchanged(),
        FlipAndShift(),
        CropAndFlip(),
        RandomOperations(),
        AffinePhotometric(),
        Composed([AffinePhotometric(), FlipAndShift()]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_a_view_depends_on_sample_and_seed_alone(view):
    whole = view(IMAGES, SEEDS)
    assert whole.dtype == torch.uint8 and whole.shape == IMAGES.shape
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))[:20]
    assert torch.equal(view(IMAGES[order], SEEDS[order]), whole[order])
    assert torch.equal(view(IMAGES, SEEDS), whole)


def test_shifts_and_flips_are_those_of_the_numbers():
    """Shift of 12.5 % of 16 pixels: -2 to 2."""
    found = FlipAndShift(0.5, 0.125)(IMAGES, SEEDS)
    seen = set()
    for i in range(64):
        down, right = (int(uniform(SEEDS[i : i + 1], n) * 5) - 2 for n in (0, 1))
        flipped = bool(uniform(SEEDS[i : i + 1], 2) < 0.5)
        seen.add((down, right, flipped))
        image = IMAGES[i].flip(2) if flipped else IMAGES[i]
        for y, x in ((0, 0), (7, 9), (15, 15), (3, 15)):
            source = image[:, min(max(y + down, 0), 15), min(max(x + right, 0), 15)]
            assert torch.equal(found[i, :, y, x], source), (i, y, x)
    assert {down for down, _, _ in seen} == {-2, -1, 0, 1, 2} and {flip for _, _, flip in seen} == {True, False}


def test_no_flip_and_no_shift_change_nothing():
    assert torch.equal(FlipAndShift(0.0, 0.0)(IMAGES, SEEDS), IMAGES)
    assert torch.equal(FlipAndShift(1.0, 0.0)(IMAGES, SEEDS), IMAGES.flip(3))


def test_parts_are_those_of_the_published_crop():
    """Area between half and all, ratio of the sides up to 4 / 3 but for whole pixels, somewhere inside; every size is met."""
    boxes = CropAndFlip().boxes((40, 40), seeds_of(0, 3, torch.arange(4000))).double()
    top, left, height, width = boxes.T
    assert (boxes >= 0).all() and (top + height <= 40).all() and (left + width <= 40).all()
    share, ratio = height * width / 1600, width / height
    assert 0.48 < share.min() < 0.52 and share.max() == 1.0
    assert 0.72 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.39
    # the first try is kept unless a side is too long, and of the small ones none is: as many as of any other tenth
    kept = 1 - (share < 0.56).double().mean()
    assert kept == pytest.approx(1 - 0.12 / 0.78, abs=0.03)
    for place, side in ((top, height), (left, width)):
        room = side < 40
        assert (place[room] / (40 - side[room])).mean() == pytest.approx(0.5, abs=0.02)


def test_a_part_is_enlarged_as_pillow_does_it():
    """Of medium values: Pillow cuts off what leaves 0 to 255 between height and width too."""
    view, images = CropAndFlip(flip=0.5), IMAGES // 2 + 64
    found, boxes = view(images, SEEDS), view.boxes((16, 16), SEEDS).tolist()
    for i, (top, left, height, width) in enumerate(boxes):
        image = Image.fromarray(images[i].permute(1, 2, 0).numpy()).crop((left, top, left + width, top + height))
        right = torch.from_numpy(numpy.array(image.resize((16, 16), Image.Resampling.BICUBIC))).permute(2, 0, 1)
        right = right.flip(2) if uniform(SEEDS[i : i + 1], 0) < 0.5 else right
        assert (found[i].int() - right.int()).abs().max() <= 1, "Pillow counts in whole numbers"


def test_the_whole_unflipped_is_the_image_and_flips_can_be_off():
    assert torch.equal(CropAndFlip(1.0, 0.0, 1.0)(IMAGES, SEEDS), IMAGES)
    assert torch.equal(CropAndFlip(1.0, 1.0, 1.0)(IMAGES, SEEDS), IMAGES.flip(3))
    assert CropAndFlip().boxes((4, 400), SEEDS)[:, 2:].tolist() == [[4, 400]] * 64, "nothing of such a ratio fits"


def test_views_one_after_the_other_have_numbers_of_their_own():
    first, second = (SEEDS * 31 + place + 1 for place in range(2))
    first, second = (
        torch.tensor([(splitmix(int(seed)) + 2**63) % 2**64 - 2**63 for seed in seeds]) for seeds in (first, second)
    )
    shift = FlipAndShift(0.5, 0.25)
    assert torch.equal(Composed([shift, shift])(IMAGES, SEEDS), shift(shift(IMAGES, first), second))
    with pytest.raises(ConfigError, match="at least one view"):
        Composed([])


@pytest.mark.parametrize("view", [FlipAndShift(), CropAndFlip(), RandomOperations(), AffinePhotometric()])
@pytest.mark.parametrize(
    "inputs", [torch.zeros(2, 3, 4, 4), torch.zeros(2, 7, dtype=torch.uint8), {"a": torch.zeros(2)}]
)
def test_what_is_no_image_is_refused(view, inputs):
    with pytest.raises(ConfigError, match="is for images") as raised:
        view(inputs, SEEDS[:2])
    assert "Unchanged" in raised.value.todo


def test_numbers_out_of_range_are_refused():
    for arguments in ({"flip": 1.5}, {"shift": 1.0}, {"shift": -0.1}):
        with pytest.raises(ConfigError, match="FlipAndShift"):
            FlipAndShift(**arguments)
    for arguments in ({"smallest": 0.0}, {"smallest": 1.1}, {"flip": -0.1}, {"ratio": 0.9}, {"ratio": math.inf}):
        with pytest.raises(ConfigError, match="CropAndFlip"):
            CropAndFlip(**arguments)
