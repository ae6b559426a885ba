"""Views: functions of sample and seed alone, exact where they move pixels, and of the size they say."""

import math

import pytest
import torch

from adamerge.errors import ConfigError
from adamerge.objectives import FlipAndShift, RandomOperations, Unchanged
from adamerge.objectives import views as module
from adamerge.objectives.views import OPERATIONS, seeds_of, uniform

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


@pytest.mark.parametrize("view", [Unchanged(), FlipAndShift(), RandomOperations()], ids=lambda v: type(v).__name__)
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


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_an_operation_of_no_strength_changes_nothing_and_of_full_strength_much(operation):
    images = IMAGES.float()
    nothing = operation(images, torch.zeros(64, 1, 1, 1))
    assert (nothing - images).abs().max() < 1e-3
    for strength in (-1.0, 1.0):
        changed = operation(images, torch.full((64, 1, 1, 1), strength))
        assert changed.shape == images.shape and (changed - images).abs().mean() > 5


def test_operations_by_hand():
    image, one = torch.tensor([[10.0, 200.0], [90.0, 100.0]]).expand(1, 3, 2, 2), torch.ones(1, 1, 1, 1)
    assert torch.allclose(module.brightness(image, -one)[0, 0], torch.tensor([[1.0, 20.0], [9.0, 10.0]]))
    assert torch.allclose(module.contrast(image, -one)[0, 0], torch.tensor([[91.0, 110.0], [99.0, 100.0]]))
    assert torch.equal(module.saturation(image, one), image), "grey has no saturation"
    assert module.posterise(image, one)[0, 0].tolist() == [[0, 192], [64, 64]]
    assert module.solarise(image, one / 2)[0, 0].tolist() == [[10, 55], [90, 100]]


def test_a_shear_moves_rows_about_the_middle():
    """At full strength a row at distance d from the middle is taken from 0.3 d to the side."""
    ramp = torch.arange(20.0).expand(1, 3, 20, 20)
    found = module.shear(ramp, torch.ones(1, 1, 1, 1))[0, 0]
    assert found[0, 10] == pytest.approx(10 - 0.3 * 9.5, abs=1e-3) and found[19, 10] == pytest.approx(12.85, abs=1e-3)


def test_the_strong_view_cuts_a_grey_square_of_the_size_it_says():
    view = RandomOperations(operations=0, square=0.5, before=Unchanged())
    changed = (view(torch.zeros_like(IMAGES), SEEDS) == 128).all(dim=1)
    assert not (view(torch.zeros_like(IMAGES), SEEDS) % 128).any()
    assert changed.any(dim=1).sum(dim=1).max() <= 9 and changed.flatten(1).sum(1).max() > 30
    assert torch.equal(RandomOperations(0, square=0.0, before=Unchanged())(IMAGES, SEEDS), IMAGES)


def test_strength_is_a_limit():
    calm, wild = (RandomOperations(2, s, 0.0, Unchanged())(IMAGES, SEEDS).float() for s in (0.1, 1.0))
    assert 0 < (calm - IMAGES).abs().mean() < (wild - IMAGES).abs().mean()


@pytest.mark.parametrize("view", [FlipAndShift(), RandomOperations()])
@pytest.mark.parametrize(
    "inputs", [torch.zeros(2, 3, 4, 4), torch.zeros(2, 7, dtype=torch.uint8), {"a": torch.zeros(2)}]
)
def test_what_is_no_image_is_refused(view, inputs):
    with pytest.raises(ConfigError, match="is for images"):
        view(inputs, SEEDS[:2])


def test_numbers_out_of_range_are_refused():
    for arguments in ({"flip": 1.5}, {"shift": 1.0}, {"shift": -0.1}):
        with pytest.raises(ConfigError, match="FlipAndShift"):
            FlipAndShift(**arguments)
    for arguments in ({"operations": -1}, {"strength": 2.0}, {"square": -0.1}):
        with pytest.raises(ConfigError, match="RandomOperations"):
            RandomOperations(**arguments)
