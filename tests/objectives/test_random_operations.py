"""Operations: each by hand, nothing at no strength, and of the size they say."""

import pytest
import torch

from adamerge.errors import ConfigError
from adamerge.objectives import RandomOperations, Unchanged
from adamerge.objectives import random_operations as module
from adamerge.objectives.random_operations import OPERATIONS
from adamerge.objectives.views import seeds_of

IMAGES = torch.randint(0, 256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
SEEDS = seeds_of(0, 3, torch.arange(64))


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


def test_numbers_out_of_range_are_refused():
    for arguments in ({"operations": -1}, {"strength": 2.0}, {"square": -0.1}):
        with pytest.raises(ConfigError, match="RandomOperations"):
            RandomOperations(**arguments)
