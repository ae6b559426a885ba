"""Pictures: each mode of Pillow to 8-bit RGB, pixel by pixel, and what is refused."""

import io

import datasets
import numpy as np
import pytest
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from adamerge.data import ImageCalibration, ImageTask
from adamerge.data.pictures import CONVERTED, SIXTEEN_BITS, TRANSPARENT, eight_bit, with_eight_bits
from adamerge.errors import DataError

GREY = 60
PIXELS = {
    "1": (1, (255, 255, 255)),
    "L": (GREY, (GREY, GREY, GREY)),
    "RGB": ((10, 20, 30), (10, 20, 30)),
    "RGBX": ((10, 20, 30, 0), (10, 20, 30)),
    "CMYK": ((255, 0, 0, 0), (0, 255, 255)),
    "YCbCr": ((GREY, 128, 128), (GREY, GREY, GREY)),
    "HSV": ((0, 255, 200), (200, 0, 0)),
    # laid on white by hand: alpha * colour + (1 - alpha) * 255, alpha = 51 / 255 = 0.2
    "LA": ((GREY, 51), (216, 216, 216)),
    "RGBA": ((10, 60, 110, 51), (206, 216, 226)),
    "La": ((12, 51), (216, 216, 216)),
    "RGBa": ((2, 12, 22, 51), (206, 216, 226)),
    # round(value / 257): 128 * 257 was white before
    "I;16": (128 * 257, (128, 128, 128)),
    "I;16B": (127 * 257 + 129, (128, 128, 128)),
    "I;16L": (127 * 257 + 128, (127, 127, 127)),
    "I;16N": (65535, (255, 255, 255)),
    "I": (128 * 257, (128, 128, 128)),
}


@pytest.mark.parametrize("mode", PIXELS)
def test_a_pixel_of_each_mode(mode):
    value, expected = PIXELS[mode]
    made = eight_bit(Image.new(mode, (3, 2), value))
    assert made.mode == "RGB" and made.size == (3, 2)
    assert np.abs(np.asarray(made).astype(int) - expected).max() <= (1 if mode in {"La", "RGBa"} else 0)


def test_the_ends_of_the_colour_space_that_eyes_see():
    """L* = 100 and 0, both without colour; a profile's rounding may take a step."""
    for lightness, grey in ((255, 255), (0, 0)):
        found = np.asarray(eight_bit(Image.new("LAB", (1, 1), (lightness, 128, 128)))).astype(int)
        assert np.abs(found - grey).max() <= 2


@pytest.mark.parametrize("mode", ["P", "PA"])
def test_palettes(mode):
    picture = Image.new("P", (1, 1), 1)
    picture.putpalette([0, 0, 0, 10, 60, 110], "RGB")
    assert eight_bit(picture.convert(mode)).getpixel((0, 0)) == (10, 60, 110)


@pytest.mark.parametrize(("mode", "see_through"), [("P", 1), ("L", GREY), ("RGB", (10, 20, 30))])
def test_a_colour_that_the_file_calls_transparent_is_white(mode, see_through):
    picture = Image.new(mode, (2, 1), see_through)
    if mode == "P":
        picture.putpalette([0, 0, 0, 10, 60, 110], "RGB")
    picture.putpixel((1, 0), (0, 0, 0) if mode == "RGB" else 0)
    file = io.BytesIO()
    picture.save(file, "PNG", transparency=see_through)
    made = eight_bit(Image.open(file))
    assert [made.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 0)]


def test_all_of_sixteen_bits_is_rounded_to_the_nearest():
    """Each of the 65,536 values, in the order of bytes of both kinds of machine, against floats."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for order, mode in (("<u2", "I;16"), (">u2", "I;16B")):
        picture = Image.frombytes(mode, (256, 256), values.astype(order).tobytes())
        assert np.array_equal(np.asarray(eight_bit(picture))[..., 1], np.rint(values / 257.0))


@pytest.mark.parametrize("values", [[0, 200], [-1, 300], [0, 65536]])
def test_values_of_mode_i_that_may_mean_anything_are_refused(values):
    with pytest.raises(DataError, match=f"mode I with values from {values[0]} to {values[1]}"):
        eight_bit(Image.fromarray(np.array([values], dtype=np.int32)))
    assert eight_bit(Image.new("I", (1, 1), 0)).getpixel((0, 0)) == (0, 0, 0)


def test_floats_are_refused():
    with pytest.raises(DataError, match="mode F, of which nothing says what is white"):
        eight_bit(Image.new("F", (1, 1), 0.5))


def test_every_mode_of_pillow_has_an_answer_and_a_test():
    known = CONVERTED | TRANSPARENT | SIXTEEN_BITS | {"I", "F"}
    assert set(Image._MODEINFO) <= known if hasattr(Image, "_MODEINFO") else True
    assert known == PIXELS.keys() | {"LAB", "P", "PA", "F"}


def test_pictures_among_other_columns():
    made = with_eight_bits({"image": Image.new("L", (1, 1), 7), "question": "what?"})
    assert made["image"].mode == "RGB" and made["question"] == "what?" and with_eight_bits("text") == "text"


def test_files_of_sixteen_bits_reach_every_network_scaled(tmp_path):
    """A PNG and a TIFF on disk, through the data module, to a stand-in for a backbone."""
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(10):
                deep = Image.fromarray(np.full((4, 4), (100 + n) * 257, dtype=np.uint16))
                deep.save(tmp_path / split / name / f"{n}.{'png' if name == 'cat' else 'tiff'}")
    data = ImageCalibration(tasks={"pets": ImageTask(str(tmp_path), ["a {}"])})
    data.serve(type("Pictures", (), {"preprocess": staticmethod(pil_to_tensor)})())
    seen = {int(data.samples("pets", "test")[i].unique()) for i in range(20)}
    assert seen == set(range(100, 110)) and isinstance(data.rows("pets", "test").features["image"], datasets.Image)
