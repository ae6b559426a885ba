"""The figure of a comparison: score against seconds of the fit, a mark for each section, numbered from the best on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adamerge.io.atomic import staged_file
from adamerge.runs.finished_runs import SECTIONS

MARKS = dict(zip(SECTIONS, ("s", "o", "^"), strict=True))
FASTEST = 0.01
"""Seconds from which the axis begins: what takes less is drawn there."""


def draw_comparison(result: Mapping[str, Any], path: Path) -> None:
    """Draws every method of a comparison whose seconds are known; dashed lines are the references.

    Args:
        result: as ``compare`` returns it.
        path: of the picture.
    """
    from matplotlib.figure import Figure  # late: most commands draw nothing

    metric, methods = result["metric"], result["methods"]
    factor = metric["factor"]
    sign = -1 if metric["higher_is_better"] else 1
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    order = sorted(
        (name for name, row in methods.items() if row["section"] in MARKS and row["costs"]["seconds"] is not None),
        key=lambda name: sign * methods[name]["average"],
    )
    for section, mark in MARKS.items():
        rows = {name: methods[name] for name in order if methods[name]["section"] == section}
        if not rows:
            continue
        seconds = [max(FASTEST, row["costs"]["seconds"]) for row in rows.values()]
        scores = [factor * row["average"] for row in rows.values()]
        spreads = [factor * (row["spread"]["average"] or 0.0) for row in rows.values()]
        axes.errorbar(seconds, scores, yerr=spreads, fmt=mark, capsize=2, label=section)
        for name, place, score in zip(rows, seconds, scores, strict=True):
            number = str(order.index(name) + 1)
            axes.annotate(number, (place, score), xytext=(4, 3), textcoords="offset points", fontsize=7)
    for name in ("task_arithmetic_tuned", "individual"):
        axes.axhline(factor * methods[name]["average"], linestyle="--", linewidth=0.8, color="0.5")
        place = (1.0, factor * methods[name]["average"])
        axes.annotate(name, place, xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7, color="0.4")
    axes.set_xscale("log")
    axes.set_xlabel("seconds of the fit, teachers included")
    axes.set_ylabel(f"{metric['name']} on the {result['split']} split, {metric['unit']}")
    listed = "\n".join(f"{number}  {name}" for number, name in enumerate(order, 1))
    axes.text(1.02, 1, listed, transform=axes.transAxes, verticalalignment="top", fontsize=7)  # names would overlap
    if order:
        axes.legend(fontsize=8)
    with staged_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
