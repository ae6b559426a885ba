"""Pictures: every mode of Pillow to 8-bit RGB by one stated rule, before any network's own preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy
from PIL import Image

from adamerge.errors import DataError

SIXTEEN_BITS = {"I;16", "I;16B", "I;16L", "I;16N"}
STEP = 257
"""65535 / 255: what one step of 8 bits is in 16."""
BACKGROUND = "white"
"""What is seen through a picture's transparent parts."""
CONVERTED = {"1", "L", "RGB", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "P"}
TRANSPARENT = {"LA", "La", "PA", "RGBA", "RGBa"}


def eight_bit(picture: Image.Image) -> Image.Image:
    """Returns a picture of any mode as 8-bit RGB.

    - 1, L, P, RGB, RGBX, CMYK, YCbCr, LAB, HSV: converted by Pillow; where the file names a transparent colour, as below.
    - LA, La, PA, RGBA, RGBa: laid on white.
    - I;16, I;16B, I;16L, I;16N: 16 bits, ``round(value / 257)``.
    - I: 32 bits, in which older files keep 16: the same, if the values say so (0 alone, or a largest of 256 to 65535).
    - F, and whatever else there may be: refused, since nothing says which value is white.

    Raises:
        DataError: the mode, or in mode I the values, leave open what black and white are.
    """
    mode = picture.mode
    if mode == "RGB" and "transparency" not in picture.info:
        return picture
    if mode in SIXTEEN_BITS or mode == "I":
        values = numpy.asarray(picture).astype(numpy.int64)
        if mode == "I" and not (values.min() >= 0 and (values.max() == 0 or 255 < values.max() <= 255 * STEP)):
            raise DataError(
                f"a picture of mode I with values from {values.min()} to {values.max()}, of which nothing says what is white",
                expected="16 bits: a largest value of 256 to 65535",
                todo="save it with 8 or 16 bits",
            )
        grey = (values + STEP // 2) // STEP
        return Image.fromarray(grey.astype(numpy.uint8)).convert("RGB")
    if mode in TRANSPARENT or (mode in CONVERTED and "transparency" in picture.info):
        picture = picture.convert("LA") if mode == "La" else picture  # Pillow knows no other way from there
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, BACKGROUND)
        return Image.alpha_composite(ground, picture).convert("RGB")
    if mode not in CONVERTED:
        raise DataError(
            f"a picture of mode {mode}, of which nothing says what is white",
            expected=f"one of {sorted(CONVERTED | TRANSPARENT | SIXTEEN_BITS | {'I'})}",
            got=mode,
            todo="save it with 8 or 16 bits",
        )
    return picture.convert("RGB")


def unchanged(picture: Image.Image) -> Image.Image:
    """Returns a picture as it is."""
    return picture


def with_eight_bits(value: Any, change: Callable[[Image.Image], Image.Image] = unchanged) -> Any:
    """Returns what makes a sample with its pictures, alone or by column, as 8-bit RGB; other values as they are.

    Args:
        value: a picture, a mapping of columns, or anything else.
        change: applied to each picture then.
    """
    if isinstance(value, Image.Image):
        return change(eight_bit(value))
    if isinstance(value, Mapping):
        return {
            name: with_eight_bits(part, change) if isinstance(part, Image.Image) else part
            for name, part in value.items()
        }
    return value
