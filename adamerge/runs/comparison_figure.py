"""The figure of a comparison: a bar for each method, and beside it score against seconds of the fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adamerge.io.atomic import staged_file
from adamerge.runs.comparison_result import REFERENCE
from adamerge.runs.finished_runs import SECTIONS
from adamerge.runs.scoring import shown

if TYPE_CHECKING:  # late: most commands draw nothing
    from matplotlib.axes import Axes

LOOKS = {
    REFERENCE: ("D", "#8a929c"),
    **dict(zip(SECTIONS, [("s", "#4d7ea8"), ("o", "#1f7a74"), ("^", "#d0803a")], strict=True)),
}
"""Mark and colour of each section: references, then no data, unlabelled and labelled."""
FASTEST = 0.01
"""Seconds from which the axis begins: what takes less is drawn there."""


def draw_comparison(result: Mapping[str, Any], path: Path) -> None:
    """Draws every row of a comparison as a bar, the best first, and those whose seconds are known as points by their number.

    Args:
        result: as ``compare`` returns it.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    metric, methods = result["metric"], result["methods"]
    sign = -1 if metric["higher_is_better"] else 1
    order = sorted(methods, key=lambda name: sign * methods[name]["average"])
    figure = Figure(figsize=(13, max(4.0, 1.2 + 0.28 * len(order))), layout="constrained")
    bars, points = figure.subplots(1, 2, width_ratios=(1.1, 1))
    _draw_bars(bars, result, order)
    timed = [name for name in order if _seconds(methods[name]) is not None]
    _draw_points(points, result, {name: number for number, name in enumerate(order, 1) if name in timed})
    label = f"{metric['name']} on the {result['split']} split, {metric['unit']}"
    bars.set_xlabel(label)
    points.set_ylabel(label)
    with staged_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _draw_bars(axes: Axes, result: Mapping[str, Any], order: list[str]) -> None:
    factor, methods = result["metric"]["factor"], result["methods"]
    scores = [factor * methods[name]["average"] for name in order]
    colours = [LOOKS[methods[name]["section"]][1] for name in order]
    spreads = [factor * (methods[name]["spread"]["average"] or 0.0) for name in order]
    places = range(len(order))
    axes.barh(places, scores, color=colours, xerr=spreads if any(spreads) else None, height=0.72)
    axes.set_yticks(places, [f"{name}  {number}" for number, name in enumerate(order, 1)], fontsize=8)
    axes.invert_yaxis()
    for place, name, end in zip(places, order, map(sum, zip(scores, spreads, strict=True)), strict=True):
        told = shown(methods[name]["average"], factor)
        axes.annotate(told, (end, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
    least, most = min(scores), max(scores)
    room = most - least or abs(most) or 1.0
    axes.set_xlim(max(0.0, least - 0.35 * room), most + 0.15 * room)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_points(axes: Axes, result: Mapping[str, Any], numbers: Mapping[str, int]) -> None:
    factor, methods = result["metric"]["factor"], result["methods"]
    for section, (mark, colour) in LOOKS.items():
        rows = {name: methods[name] for name in numbers if methods[name]["section"] == section}
        if rows:
            seconds = [max(FASTEST, _seconds(row) or 0.0) for row in rows.values()]
            scores = [factor * row["average"] for row in rows.values()]
            axes.plot(seconds, scores, mark, color=colour, label=section)
            for name, place, score in zip(rows, seconds, scores, strict=True):
                axes.annotate(str(numbers[name]), (place, score), xytext=(4, 3), textcoords="offset points", fontsize=8)
    for name in ("task_arithmetic_tuned", "individual"):
        height = factor * methods[name]["average"]
        axes.axhline(height, linestyle="--", linewidth=0.8, color="0.5")
        axes.annotate(
            name, (1.0, height), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color="0.4"
        )
    axes.set_xscale("log")
    axes.set_xlabel("seconds of the fit, teachers included")
    axes.spines[["top", "right"]].set_visible(False)
    if numbers:
        axes.legend(fontsize=8, loc="best")


def _seconds(row: Mapping[str, Any]) -> float | None:
    seconds: float | None = (row.get("costs") or {}).get("seconds")
    return seconds
