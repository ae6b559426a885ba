"""The heat map: what was learned, as a picture."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
from matplotlib import colormaps
from matplotlib.figure import Figure

from adamerge.io.atomic import staged_file

Table = Mapping[str, Mapping[str, list[float]]]
"""Group name to expert name to the group's coefficients."""


def draw_heatmap(
    table: Table, path: Path, title: str = "Merging coefficients", held: Mapping[str, Sequence[str]] | None = None
) -> None:
    """A picture of the coefficients: experts across, groups down (the mean of a group's chunks), values written small.

    Args:
        table: group name to expert name to the group's coefficients.
        path: of the PNG.
        title: above it.
        held: group name to the experts whose coefficients there were not learned: they are grey.
    """
    groups = sorted(table, key=_natural)
    experts = list(table[groups[0]])
    values = [[sum(table[group][task]) / len(table[group][task]) for task in experts] for group in groups]
    size = (2.5 + 0.75 * len(experts) + 0.06 * max(map(len, groups)), 1.4 + 0.19 * max(len(groups), 4))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    kept = [[task in (held or {}).get(group, ()) for task in experts] for group in groups]
    shown = [
        value for line, grey in zip(values, kept, strict=True) for value, g in zip(line, grey, strict=True) if not g
    ]
    low, high = min(0.0, *shown), max(1e-6, *shown)
    masked = numpy.ma.masked_array(values, kept)
    image = axes.imshow(masked, aspect="auto", cmap=colormaps["viridis"].with_extremes(bad="0.8"), vmin=low, vmax=high)
    axes.set_xticks(range(len(experts)), experts, rotation=40, ha="right")
    axes.set_yticks(range(len(groups)), groups, fontsize=7)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)  # a $ in a task's name is a $
    if len(groups) * len(experts) <= 1000:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                colour = "black" if value > (low + high) / 2 or kept[row][column] else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=5, color=colour)
    axes.set_title(f"{title} (grey: held)" if any(map(any, kept)) else title, fontsize=10)
    figure.colorbar(image, shrink=0.6)
    with staged_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts block 10 after block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
