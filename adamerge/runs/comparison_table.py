"""The table of a comparison: one row a method, by sections and classes, as text that every writer takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from adamerge.runs.comparison_result import REFERENCE, SMALL
from adamerge.runs.finished_runs import SECTIONS
from adamerge.runs.scoring import shown
from adamerge.task_vectors.memory import size

CLASSES = {"few": f"up to {SMALL:.0%} learned", "many": f"above {SMALL:.0%} learned", None: "cost unknown"}
"""Of learned scalars as a share of the merged elements, in the order of the table."""
LAST = "individual"
SCORES = ["average", "± seeds", "gap closed", "to oracle", "± samples", "worst task"]
COSTS = ["seconds", "steps", "passes", "teacher passes", "peak memory", "learned", "share"]


@dataclass(frozen=True)
class Part:
    """Rows that are ranked among each other.

    Attributes:
        title: what their methods have seen, and how many scalars they learn.
        rows: cells, as many as the table has headings; the first two are rank and name.
    """

    title: str
    rows: list[list[str]]


@dataclass(frozen=True)
class ComparisonTable:
    """A comparison as text.

    Attributes:
        title: metric, split and what else holds for all rows.
        headings: of the columns.
        parts: of the rows, in order.
        notes: what the columns mean, a sentence each.
    """

    title: str
    headings: list[str]
    parts: list[Part]
    notes: list[str]


def table_of(result: Mapping[str, Any]) -> ComparisonTable:
    """Returns the table of a comparison, as ``compare`` returns it."""
    metric, tasks, methods = result["metric"], list(result["tasks"]), result["methods"]
    sign = 1 if metric["higher_is_better"] else -1
    kinds = list(next(iter(methods.values()))["corrupted"])
    headings = ["rank", "method", *tasks, *SCORES, *(f"{kind} (spoiled)" for kind in kinds), *COSTS]
    cells = _cells_of(result, kinds)
    references = [name for name, row in methods.items() if row["section"] == REFERENCE]
    references.sort(key=lambda name: (name == LAST, sign * methods[name]["average"]))
    parts = [Part("references", [["", *cells(name)] for name in references])]
    for section in SECTIONS:
        for kind, told in CLASSES.items():
            names = [name for name, row in methods.items() if (row["section"], row.get("class")) == (section, kind)]
            names.sort(key=lambda name: -sign * methods[name]["average"])
            if names:
                rows = [[str(rank), *cells(name)] for rank, name in enumerate(names, 1)]
                parts.append(Part(f"{section}, {told}", rows))
    title = f"{metric['name']} on the {result['split']} split, {metric['unit']}"
    if result.get("forward_passes") is not None:
        title += f"; {result['forward_passes']:,} forward passes of the merged model a search"
    return ComparisonTable(title, headings, parts, _notes(result))


def _cells_of(result: Mapping[str, Any], kinds: Sequence[str]) -> Callable[[str], list[str]]:
    """Returns the function that makes the cells of a row, without its rank."""
    metric, methods = result["metric"], result["methods"]
    factor, sign = metric["factor"], 1 if metric["higher_is_better"] else -1
    gap = sign * (methods[LAST]["average"] - methods["task_arithmetic_tuned"]["average"]) > 0  # else none to close
    number = lambda value: "" if value is None else f"{value:,.0f}"  # noqa: E731

    def cells(name: str) -> list[str]:
        row = methods[name]
        (difference, error), (worst, below, _) = row["to_oracle"], row["worst_task"]
        costs, spread = row.get("costs", {}), row["spread"]["average"]
        seconds, share, peak = costs.get("seconds"), costs.get("share"), costs.get("peak_bytes")
        marks = "*" if row["protocol"].get("transductive") else ""
        called = f"{name} ({result['tuned_lambda']})" if name == "task_arithmetic_tuned" else name
        return [
            called + marks,
            *(shown(row["per_task"][task], factor) for task in result["tasks"]),
            shown(row["average"], factor),
            "" if spread is None else shown(spread, factor),
            f"{100 * row['gap_closed'] + 0.0:.0f} %" if gap else "none",
            _signed(difference, factor),
            shown(error, factor),
            f"{worst} {_signed(below, factor)}",
            *(shown(row["corrupted"][kind], factor) for kind in kinds),
            "" if seconds is None else f"{seconds:.1f}",
            number(costs.get("steps")),
            number(costs.get("merged_passes")),
            number(costs.get("teacher_passes")),
            "" if peak is None else size(round(peak)),
            number(costs.get("learned")),
            "" if share is None else f"{100 * share:.3g} %",
        ]

    return cells


def _signed(value: float, factor: float) -> str:
    return f"{'+' if value >= 0 else ''}{shown(value, factor)}"


def _notes(result: Mapping[str, Any]) -> list[str]:
    metric, split = result["metric"], result["split"]
    notes = [
        "gap closed: share of the way from tuned task arithmetic to the individual experts.",
        f"to oracle: {metric['unit']} over tuned task arithmetic, whose coefficient is chosen on the {split} labels; "
        "± samples: one paired standard error.",
        "worst task: the largest loss against tuned task arithmetic.",
        "passes: samples through the merged network in the search; teacher passes: through the experts; share: learned "
        "scalars of all stages by the elements that are merged; peak memory: of the device, else of the process.",
    ]
    if len(result["seeds"]) > 1:
        told = ", ".join(map(str, result["seeds"]))
        notes.append(f"Means over the seeds {told}; ± seeds: their standard deviation.")
    if result["leave_out"]:
        told = ", ".join(result["leave_out"])
        notes.append(f"Left out of every fit and of task arithmetic, expert and data: {told}.")
    if any(row["protocol"].get("transductive") for row in result["methods"].values()):
        notes.append("*: calibrated on the inputs of the test split itself, as the papers do.")
    for name, one in result["left_out"].items():
        notes.append(f"{name} is left out: it has {one}.")
    return notes


def print_table(result: Mapping[str, Any]) -> None:
    """Prints a comparison as tables that fit a terminal: scores by task, costs, and last what methods are ranked by.

    Each has one row per method, best first in each part. The files have all in one.

    Args:
        result: as ``compare`` returns it.
    """
    made = table_of(result)
    tasks = [one for one in made.headings if one not in {"rank", "method", *SCORES, *COSTS}]
    for title, columns in ((f"{made.title}, by task", tasks), ("costs", COSTS), (made.title, SCORES)):
        _print(made, title, columns)
    for note in made.notes:
        Console().print(note, highlight=False, markup=False)


def _print(made: ComparisonTable, title: str, columns: Sequence[str]) -> None:
    """Prints some columns beside the methods' names, but those that are empty, no narrower than they can be.

    A column that begins with ± says how sure the one before it is, and is printed with it.
    """
    places = [made.headings.index(column) for column in columns]
    filled = [place for place in places if any(row[place] for part in made.parts for row in part.rows)]
    table = Table(
        "method",
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for place in filled:
        if not made.headings[place].startswith("±"):
            table.add_column(made.headings[place], justify="right")
    for part in made.parts:
        rows = [row for row in part.rows if any(row[place] for place in filled)]
        if rows:
            table.add_row(f"[bold]{escape(part.title)}[/bold]")
        for row in rows:
            cells: list[str] = []
            for place in filled:
                if not made.headings[place].startswith("±"):
                    cells.append(row[place])
                elif row[place]:
                    cells[-1] += f" ± {row[place]}"
            table.add_row(*map(escape, [row[1], *cells]))
        table.add_section()
    for column in table.columns:
        column.no_wrap = True
    console = Console()
    natural = Measurement.get(console, console.options.update(max_width=1 << 20), table).maximum
    console.width = max(console.width, natural)
    console.print(table, "")
