"""The heat map: learned coefficients as a picture, depth across, kinds of tensors down, a panel for each expert."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from numpy.typing import NDArray

from adamerge.artifacts.coefficient_table import Table, moments_of
from adamerge.artifacts.colour_scale import ColourScale, scale_of
from adamerge.artifacts.heatmap_cells import Grid, Panel, arrange, panels_of, with_means
from adamerge.io.atomic import staged_file

SMALL, MEDIUM, LARGE = 6.5, 8.0, 11.0  # points
CELL, LINE, SPACE = 0.16, 0.15, 0.06  # inches: a cell's width, a line's height, and what keeps things apart
SIZE, DPI, LARGEST = 1.5, 150, 60_000  # width by height of a picture, and pixels that a side may have


def notes_of(table: Table, grid: Grid, panels: Sequence[Panel], held: Mapping[str, Sequence[str]]) -> str:
    """Says in words what stands where, what has no colour, and how far a group's coefficients spread around their mean."""
    notes = []
    if grid.stacks:
        outside = "names: what is in no block" if len(grid.rows) == 1 else "in, out: tensors before and after them"
        notes.append(f"Across: depth, by the numbers of blocks ({', '.join(filter(None, grid.stacks))}); {outside}.")
    if len(set(grid.cells.values())) < len(grid.cells):
        notes.append("*: any number; the cell shows the mean over all.")
    if len(grid.cells) > 1 or len(panels[0].rows) > 1:
        notes.append("Every cell counts the same in a mean.")
    marks = {int(mark) for panel in panels for mark in numpy.unique(panel.marks)}
    notes += ["Grey: held, not learned, and in no mean."] * (1 in marks)
    notes += ["x: not finite, and in no mean."] * (2 in marks)
    spreads = [
        (moments_of(own).spread, expert, group)
        for group, experts in table.items()
        for expert, own in experts.items()
        if len(own) > 1 and all(map(math.isfinite, own)) and expert not in held.get(group, ())
    ]
    if spreads:
        most, expert, group = max(spreads)
        mean = sum(spread for spread, _, _ in spreads) / len(spreads)
        notes.append(
            "Where a tensor or group has several coefficients, its cell shows their mean; their standard deviation is "
            f"{mean:.2g} on average, {most:.2g} at most ({expert}, {group})."
        )
    return " ".join(notes)


def _width(text: str, size: float = SMALL) -> float:
    """Inches of a line of text, and a little more, since what is drawn keeps to whole pixels."""
    return 1.08 * float(text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)[0]) / 72


def _fitted(text: str, inches: float, size: float = SMALL) -> str:
    """Leaves out the middle of a line that is too long, and what cannot be printed."""
    text = shown = "".join(letter if letter.isprintable() else "?" for letter in text)
    keep = len(text)
    while _width(shown, size) > inches and keep > 4:
        keep -= 2
        shown = f"{text[: keep // 2]}…{text[-(keep // 2) :]}"
    return shown


class _Page:
    """A figure that is laid out in inches from its top left corner, and cut to what is on it in the end."""

    def __init__(self) -> None:
        self.figure = Figure()
        self.boxes: list[tuple[Axes, float, float, float, float]] = []

    def axes(self, left: float, top: float, wide: float, high: float) -> Axes:
        """Adds axes whose coordinates are inches, from the top down."""
        axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, wide), ylim=(high, 0), label=str(len(self.boxes)))
        axes.set(xticks=[], yticks=[], facecolor="none")
        axes.tick_params(length=0, pad=2)
        axes.spines[:].set_visible(False)
        self.boxes.append((axes, left, top, wide, high))
        return axes

    def write(self, text: str, left: float, top: float, size: float = SMALL) -> float:
        """Writes a paragraph; returns where the next thing may begin."""
        for line in textwrap.wrap(text, 110):
            axes = self.axes(left, top, _width(line, size), size / 50)
            axes.text(0, size / 70, line, fontsize=size, va="baseline", parse_math=False)
            top += size / 50
        return top + SPACE

    def finish(self) -> Figure:
        """Sets the size and puts everything in its place."""
        width = max(left + wide for _, left, _, wide, _ in self.boxes) + SPACE
        height = max(top + high for _, _, top, _, high in self.boxes) + SPACE
        self.figure.set_size_inches(width, height)
        for axes, left, top, wide, high in self.boxes:
            axes.set_position((left / width, 1 - (top + high) / height, wide / width, high / height))
        return self.figure


def _edges(count: int, size: float, mean: float) -> NDArray[numpy.float64]:
    """Where cells begin and end, ``(cells, 2)``, with that of the mean where there are several."""
    starts = numpy.arange(count + (count > 1)) * size
    edges = numpy.stack([starts, starts + size], axis=1)
    if count > 1:
        edges[-1] = starts[-1] + SPACE, starts[-1] + SPACE + mean
    return edges


def _draw(
    page: _Page, panels: Sequence[Panel], columns: Sequence[str], scale: ColourScale, *, notes: str, top: float
) -> float:
    """Draws panels that share a scale, its colour bar and the notes; returns where the next thing may begin."""
    down, across = panels[0].values.shape
    number = max(map(_width, ["mean", *map(scale.text, (scale.low, scale.high))])) + SPACE
    filled = across <= (40 if len(panels) == 1 else 6)
    xs, ys = _edges(across, number if filled else CELL, number), _edges(down, LINE, LINE if filled else number)
    rows = [*(_fitted(row, 3) for row in panels[0].rows), "mean"][: len(ys)]
    columns = [*(_fitted(column, 2) for column in columns), "mean"][: len(xs)]
    turned = any(_width(label) > end - begin for label, (begin, end) in zip(columns, xs, strict=True))
    left = 2 * SPACE + max(map(_width, rows))
    above = 1.5 * LINE if panels[0].title else 0
    wide, high = xs[-1, 1] + 2 * SPACE, above + ys[-1, 1] + (max(map(_width, columns)) if turned else LINE) + LINE
    counts = range(1, len(panels) + 1)
    beside = min(counts, key=lambda k: abs(math.log((left + k * wide) / (math.ceil(len(panels) / k) * high) / SIZE)))
    for at, panel in enumerate(panels):
        row, column = divmod(at, beside)
        axes = page.axes(left + column * wide, top + above + row * high, xs[-1, 1], ys[-1, 1])
        axes.set_title(_fitted(panel.title, wide - SPACE, MEDIUM), fontsize=MEDIUM, loc="left", pad=4, parse_math=False)
        text: dict[str, Any] = {"fontsize": SMALL, "parse_math": False}  # a $ in a name is a $
        axes.set_xticks(xs.mean(axis=1), columns, rotation=90 if turned else 0, **text)
        axes.set_yticks(ys.mean(axis=1), rows if column == 0 else [""] * len(rows), **text)
        _fill(axes, panel, xs, ys, scale, filled=filled)
    top += math.ceil(len(panels) / beside) * high
    bar, middle = page.axes(left, top, 2, 0.1), (scale.low + scale.high) / 2
    page.figure.colorbar(
        ScalarMappable(Normalize(scale.low, scale.high), scale.colours), cax=bar, orientation="horizontal"
    )
    bar.set_xticks([scale.low, middle, scale.high], map(scale.text, (scale.low, middle, scale.high)), fontsize=SMALL)
    page.write(scale.words, left + 2.3, top)
    page.axes(left, top, 2, 2 * LINE)  # what the numbers of the bar need
    return page.write(notes, left, top + 2.5 * LINE) + LINE


def _fill(axes: Axes, panel: Panel, xs: Any, ys: Any, scale: ColourScale, *, filled: bool) -> None:
    """Draws the cells of a panel and of its means; numbers into these, and into all where there is room."""
    (down, across), values = panel.values.shape, with_means(panel.values)
    norm, colours = Normalize(scale.low, scale.high), colormaps[scale.colours]

    def cells(places: Any, **looks: Any) -> None:
        corners = [[(x, y) for x, y in zip(xs[c][[0, 1, 1, 0]], ys[r][[0, 0, 1, 1]], strict=True)] for r, c in places]
        axes.add_collection(PolyCollection(corners, edgecolors="0.7", linewidths=0.3, **looks))

    def write(row: int, column: int, text: str, turned: bool = False, colour: str = "black") -> None:
        place: dict[str, Any] = {
            "ha": "center",
            "va": "center" if turned else "center_baseline",
            "rotation": 90 if turned else 0,
        }
        axes.text(xs[column].mean(), ys[row].mean(), text, fontsize=SMALL, color=colour, **place)

    shown = numpy.argwhere(~numpy.ma.getmaskarray(values))
    cells(shown, array=values.compressed(), cmap=colours, norm=norm)
    cells(numpy.argwhere(panel.marks == 1), facecolors="0.8")
    cells(numpy.argwhere(panel.marks == 2), facecolors="white")
    for row, column in numpy.argwhere(panel.marks == 2):
        write(row, column, "x")
    for row, column in shown:
        if filled or row == down or column == across:
            value = values[row, column]
            dark = numpy.dot(colours(norm(value))[:3], (0.3, 0.6, 0.1)) < 0.5
            write(row, column, scale.text(value), not filled and column < across, "white" if dark else "black")


def draw_heatmap(
    table: Table,
    path: Path,
    title: str = "Merging coefficients",
    *,
    held: Mapping[str, Sequence[str]] | None = None,
    masks: Mapping[str, tuple[float, float]] | None = None,
    order: Sequence[str] = (),
) -> None:
    """Writes a picture of the coefficients: a small map for each expert, all on one scale, with means at the margins.

    Args:
        table: group name to expert name to the group's coefficients.
        path: of the PNG.
        title: above it.
        held: group name to the experts whose coefficients there were not learned: they are grey, and in no mean.
        masks: tensor name to the mean probability that its mask keeps a weight, and the share above one half.
        order: names of tensors in the network's order; files have them in the alphabet's.

    Raises:
        ExportError: the file cannot be written.
    """
    page = _Page()
    top = page.write(title, SPACE, SPACE, LARGE) + LINE
    if not table:
        top = page.write("There are no coefficients.", SPACE, top)
    else:
        grid = arrange(table, order)
        panels = panels_of(table, grid, held or {})
        scale = scale_of(numpy.concatenate([panel.values.compressed() for panel in panels]))
        top = _draw(page, panels, grid.columns, scale, notes=notes_of(table, grid, panels, held or {}), top=top)
    if masks:
        shares = {name: {"mask of all experts": [own[0]]} for name, own in masks.items()}
        grid = arrange(shares, order)
        scale = ColourScale(0.0, 1.0, "Greens", "mask: mean probability that the update of a weight is kept")
        panels = panels_of(shares, grid, {})
        _draw(page, panels, grid.columns, scale, notes=notes_of(shares, grid, panels, {}), top=top)
    figure = page.finish()
    with staged_file(path) as temporary:
        figure.savefig(temporary, dpi=min(DPI, LARGEST / max(figure.get_size_inches())), format="png")
