"""Colour scales, by hand: signs are seen, and a number has the digits that its colour has."""

import math

import numpy
import pytest

from adamerge.artifacts.colour_scale import ColourScale, scale_of

SCALES = [
    ([-0.1, 0.5], -0.5, 0.5, "red is negative, white is 0, blue is positive"),
    ([-2.0, -1.0], -2.0, 2.0, "red is negative, white is 0, blue is positive"),
    ([0.1, 0.5], 0.0, 0.5, "none is negative; the colours begin at 0"),
    ([0.3, 0.4], 0.3, 0.4, "none is negative; the colours begin at the smallest, not at 0"),
    ([0.3, 0.3], 0.0, 0.3, "none is negative; the colours begin at 0"),
    ([0.3, 0.3 + 1e-6], 0.0, 0.3 + 1e-6, "none is negative; the colours begin at 0"),
    ([0.0], 0.0, 1.0, "none is negative; the colours begin at 0"),
    ([], 0.0, 1.0, "none is learned and finite"),
]
"""Values, the ends of their scale, and what the colour bar says."""


@pytest.mark.parametrize(("values", "low", "high", "words"), SCALES)
def test_a_scale_shows_signs_and_says_so(values, low, high, words):
    scale = scale_of(numpy.array(values))
    assert (scale.low, scale.high, scale.words) == (low, high, f"coefficient: {words}")


@pytest.mark.parametrize(
    ("low", "high", "value", "text"),
    [
        (0.0, 1.0, 0.314, "0.31"),
        (-0.5, 0.5, -0.004, "0.00"),  # never -0.00
        (0.0, 0.1, 0.0123, "0.012"),
        (0.0, 1000.0, 512.3, "510"),
        (0.0, 1e-9, 5e-10, "5.0e-10"),
    ],
)
def test_numbers_are_as_fine_as_the_colours(low, high, value, text):
    assert ColourScale(low, high, "viridis", "").text(value) == text
    assert math.isclose(float(text), value, abs_tol=(high - low) / 20)
