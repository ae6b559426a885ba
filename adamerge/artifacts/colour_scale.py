"""The colours of a heat map: a scale that shows signs, and numbers written as finely as its colours tell them apart."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy


class ColourScale(NamedTuple):
    """Smallest and largest value that have a colour, the name of the colour map, and what the colour bar says of it."""

    low: float
    high: float
    colours: str
    words: str

    def text(self, value: float) -> str:
        """Formats a number as finely as the colours tell values apart."""
        decimals = 2 - math.ceil(math.log10((self.high - self.low) / 2.5))
        if not -6 < decimals < 6:
            return f"{value:.1e}"
        return f"{round(value, decimals) + 0.0:.{max(decimals, 0)}f}"  # 0.00, never -0.00


def scale_of(values: Any) -> ColourScale:
    """Makes a scale that shows signs: symmetric about 0, or of one hue where no value is negative."""
    if not len(values):
        return ColourScale(0.0, 1.0, "viridis", "coefficient: none is learned and finite")
    low, high = float(numpy.min(values)), float(numpy.max(values))
    if low < 0:
        most = max(-low, high)
        return ColourScale(-most, most, "RdBu", "coefficient: red is negative, white is 0, blue is positive")
    if 1e-3 * high < high - low < high / 2:
        return ColourScale(
            low, high, "viridis", "coefficient: none is negative; the colours begin at the smallest, not at 0"
        )
    return ColourScale(0.0, high or 1.0, "viridis", "coefficient: none is negative; the colours begin at 0")
