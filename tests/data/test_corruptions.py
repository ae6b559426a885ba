"""Corruptions: each by its formula on planted pictures, the same for the same picture, and refused where there is none."""

import io
from types import SimpleNamespace

import datasets
import numpy
import pytest
from PIL import Image

from adamerge.data.corruptions import CORRUPTIONS, Blur, Contrast, Jpeg, Noise, check_pictures
from adamerge.errors import ConfigError


def picture(seed=0, size=24):
    return Image.fromarray(numpy.random.default_rng(seed).integers(60, 196, (size, size, 3), dtype=numpy.uint8))


def values(image):
    return numpy.asarray(image).astype(numpy.float64)


@pytest.mark.parametrize("spoil", CORRUPTIONS, ids=lambda one: one.name)
def test_the_same_picture_is_spoiled_in_the_same_way_and_keeps_size_and_mode(spoil):
    one, other = spoil(picture()), spoil(picture())
    assert one.size == (24, 24) and one.mode == "RGB"
    assert one.tobytes() == other.tobytes() != picture().tobytes()


def test_names_are_told_apart():
    assert [one.name for one in CORRUPTIONS] == ["noise", "blur", "contrast", "JPEG"]


def test_noise_has_its_deviation_and_is_another_one_for_another_picture():
    """Of n values the sample deviation is within 4 / sqrt(2 n) of the deviation, rounding to bytes aside (1/12)."""
    grey = Image.fromarray(numpy.full((128, 128, 3), 128, dtype=numpy.uint8))
    drawn = values(Noise(0.1)(grey)) - 128
    count = drawn.size
    assert abs(drawn.std() / (25.5**2 + 1 / 12) ** 0.5 - 1) < 4 / (2 * count) ** 0.5
    assert abs(drawn.mean()) < 4 * 25.5 / count**0.5
    other = Image.fromarray(numpy.full((128, 128, 3), 129, dtype=numpy.uint8))
    assert (values(Noise(0.1)(other)) - 129 != drawn).mean() > 0.9


def test_noise_is_clipped():
    white = Image.fromarray(numpy.full((16, 16, 3), 255, dtype=numpy.uint8))
    assert values(Noise(0.5)(white)).max() == 255 and values(Noise(0.5)(white)).min() >= 0


def test_contrast_by_hand():
    rows = numpy.zeros((1, 2, 3), dtype=numpy.uint8)
    rows[0, 0], rows[0, 1] = (0, 100, 200), (100, 100, 100)
    made = values(Contrast(0.4)(Image.fromarray(rows)))
    assert made.tolist() == [[[30, 100, 170], [70, 100, 130]]]  # means 50, 100, 150


def test_blur_is_as_wide_on_a_larger_picture():
    """A step's edge is smeared over a share of the side: its slope, times the side, is the same."""

    def slope(size):
        rows = numpy.zeros((size, size, 3), dtype=numpy.uint8)
        rows[:, size // 2 :] = 255
        line = values(Blur(0.05)(Image.fromarray(rows)))[size // 2, :, 0]
        return numpy.diff(line).max() * size

    assert slope(400) == pytest.approx(slope(200), rel=0.1)
    assert slope(400) < 0.2 * 255 * 400


def test_jpeg_is_pillows(tmp_path):
    file = io.BytesIO()
    picture().save(file, format="jpeg", quality=15)
    assert Jpeg(15)(picture()).tobytes() == Image.open(file).convert("RGB").tobytes()


def test_texts_are_refused():
    rows = {"picture": datasets.Dataset.from_dict({"image": [picture()]}).cast_column("image", datasets.Image())}
    rows["text"] = datasets.Dataset.from_dict({"image": ["words"]})
    data = SimpleNamespace(tasks=["picture"], rows=lambda task, split: rows[task], columns=lambda task: ("image",))
    check_pictures(data, "test")
    data.tasks = ["picture", "text"]
    with pytest.raises(ConfigError, match="task 'text' has none"):
        check_pictures(data, "test")
