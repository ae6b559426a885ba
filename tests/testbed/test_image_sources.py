"""The sources: clean images of the promised form, the same for the same seed, from places that no two splits share."""

import hashlib
from pathlib import Path

import pytest
import torch
from PIL import ImageFont

from adamerge.testbed import image_sources as sources
from adamerge.testbed.image_sources import CANVAS, FONTS, SPLITS, Glyphs, HandwrittenDigits, Photographs, package_file

PHOTOS = [("skimage", "data/chelsea.png"), ("skimage", "data/coffee.png")]
MAKERS = {
    "digits": HandwrittenDigits,
    "textures": lambda: Photographs([("skimage", "data/brick.png"), ("skimage", "data/grass.png")], "L", 56, 0.03),
    "photos": lambda: Photographs(PHOTOS, "RGB", 64, 0.04),
    "glyphs": lambda: Glyphs("abΩ∞"),
}
CLASSES = {"digits": 10, "textures": 2, "photos": 2, "glyphs": 4}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hashes(images: torch.Tensor) -> list[bytes]:
    return [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", MAKERS)
def test_images_and_labels_are_of_the_promised_form(name, split):
    images, labels = MAKERS[name]().draw(split, 40, seeded())
    assert images.shape == (40, 3 if name == "photos" else 1, CANVAS, CANVAS) and labels.shape == (40,)
    assert images.dtype == torch.float32 and images.min() >= 0 and images.max() <= 1 + 1e-6
    assert images.flatten(1).std(1).min() > 0.01, "an empty image"
    assert set(labels.tolist()) == set(range(CLASSES[name]))


@pytest.mark.parametrize("name", MAKERS)
def test_the_seed_decides(name):
    images, labels = MAKERS[name]().draw("validation", 30, seeded(1))
    again, same = MAKERS[name]().draw("validation", 30, seeded(1))
    assert torch.equal(images, again) and torch.equal(labels, same)
    other, _ = MAKERS[name]().draw("validation", 30, seeded(2))
    assert not torch.equal(images, other)


def test_labels_are_shuffled():
    """A prefix must not be one class: ``calibration_samples`` and the first batches take one."""
    for maker in MAKERS.values():
        _, labels = maker().draw("test", 60, seeded())
        assert len(set(labels[:10].tolist())) > 1 and labels.tolist() != sorted(labels.tolist())


def test_the_shares_of_the_digits_are_disjoint_and_use_all():
    places = [place for first, last in HandwrittenDigits.shares.values() for place in range(first, last)]
    assert sorted(places) == list(range(500)) and tuple(sorted(HandwrittenDigits.shares)) == tuple(sorted(SPLITS))
    drawn = {split: HandwrittenDigits().draw(split, 10**6, seeded()) for split in SPLITS}
    for split, (images, labels) in drawn.items():
        first, last = HandwrittenDigits.shares[split]
        assert len(images) == 10 * (last - first) and labels.bincount().tolist() == [last - first] * 10
    found = [digest for images, _ in drawn.values() for digest in hashes(images)]
    assert len(set(found)) == len(found) == 5000


@pytest.mark.parametrize(
    ("package", "path", "mode", "cell"), [(*PHOTOS[0], "RGB", 64), ("skimage", "data/brick.png", "L", 56)]
)
def test_the_cells_of_a_photograph_belong_to_one_split_each(package, path, mode, cell):
    cells = sources._photograph_cells(package, path, mode, cell)
    assert len(cells) == len(SPLITS)
    assert all(part.shape[1:] == (3 if mode == "RGB" else 1, cell, cell) and len(part) for part in cells)
    found = [digest for part in cells for digest in hashes(part)]
    assert len(set(found)) == len(found)
    assert len(cells[0]) == max(map(len, cells)), "most are for training"


def test_crops_come_from_their_cells_alone(monkeypatch):
    """Cells of one grey each: whatever is drawn of a split has the greys of its cells."""
    greys = {split: 0.2 + 0.2 * place for place, split in enumerate(SPLITS)}
    cells = tuple(torch.full((3, 1, 56, 56), grey) for grey in greys.values())
    monkeypatch.setattr(sources, "_photograph_cells", lambda *file: cells)
    source = Photographs([("any", "a.png"), ("any", "b.png")], "L", 56, 0.0)
    for split, grey in greys.items():
        images, labels = source.draw(split, 9, seeded())
        assert torch.allclose(images, torch.full_like(images, grey), atol=1e-5) and len(images) == len(labels) == 9


def test_flat_crops_are_taken_last(monkeypatch):
    """Half of the cells are flat: with as many again to choose from, hardly a flat crop is taken."""
    cells = torch.cat([torch.full((4, 1, 56, 56), 0.5), torch.rand(4, 1, 56, 56, generator=seeded())])
    monkeypatch.setattr(sources, "_photograph_cells", lambda *file: (cells,) * 4)
    strict, lax = (Photographs([("any", "a.png")], "L", 56, contrast) for contrast in (0.05, 0.0))
    flat = {}
    for source in (strict, lax):
        images, _ = source.draw("train", 100, seeded())
        flat[source] = int((images.flatten(1).std(1) < 0.05).sum())
    assert flat[strict] < 20 < 35 < flat[lax] < 65


def test_a_glyph_is_dark_on_light_and_differs_from_the_others():
    images, labels = Glyphs("o|").draw("train", 80, seeded())
    corners = images[:, 0, :3, :3].mean((1, 2))
    assert (corners > 0.65).all() and (images.flatten(1).min(1).values < 0.4).float().mean() > 0.95
    wide = (images[:, 0] < 0.5).any(1).sum(1).float()
    assert wide[labels == 0].mean() > 1.5 * wide[labels == 1].mean()


def test_every_font_is_installed_and_every_glyph_is_centred():
    assert len(set(FONTS)) == len(FONTS) >= 40
    for package, path in FONTS:
        assert isinstance(sources._font(package, path), ImageFont.FreeTypeFont)
    bank = sources._glyph_bank("a")
    assert bank.dtype == torch.uint8 and bank.shape[1:] == (CANVAS, CANVAS) and len(bank) >= 0.9 * len(FONTS)
    for mask in bank:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        assert (
            abs(int(rows[0] + rows[-1]) - (CANVAS - 1)) <= 1 and abs(int(columns[0] + columns[-1]) - (CANVAS - 1)) <= 1
        )


def test_a_character_that_no_font_has_is_named():
    with pytest.raises(ValueError, match="no installed font has the character"):
        Glyphs("\U0010fffd").draw("train", 1, seeded())


def test_files_of_packages():
    assert package_file("skimage", "data", "brick.png") == Path(package_file("skimage")) / "data" / "brick.png"
    assert package_file("skimage", "data", "brick.png").is_file()
    with pytest.raises(ModuleNotFoundError, match=r"'no_such_package'.*adamerge\[demo\]"):
        package_file("no_such_package", "a")


def test_the_identity_resamples_to_itself():
    images = torch.rand(2, 3, CANVAS, CANVAS, generator=seeded())
    assert torch.allclose(sources.affine(images, torch.eye(2, 3).repeat(2, 1, 1)), images, atol=1e-4)
    numbers = sources.uniform(10_000, -2.0, 3.0, seeded())
    assert numbers.min() >= -2 and numbers.max() < 3 and float(numbers.mean()) == pytest.approx(0.5, abs=0.1)
