"""Table files: a comparison's table as CSV, as Markdown and as LaTeX, with the same cells in each."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from adamerge.io.atomic import staged_file
from adamerge.runs.comparison_table import ComparisonTable


def as_csv(table: ComparisonTable) -> str:
    """Returns a line of headings and one a row, each with its part first; title and notes are left out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["part", *table.headings])
    writer.writerows([part.title, *row] for part in table.parts for row in part.rows)
    return text.getvalue()


def as_markdown(table: ComparisonTable) -> str:
    """Returns a table of GitHub's dialect under its title, a bold line before each part, and the notes as a list."""
    lines = [f"**{_plain(table.title)}**", "", _row(table.headings), _row(["---"] * len(table.headings))]
    for part in table.parts:
        lines.append(_row(["", f"**{_plain(part.title)}**", *[""] * (len(table.headings) - 2)]))
        lines += [_row([*map(_plain, row)]) for row in part.rows]
    return "\n".join([*lines, "", *(f"- {_plain(note)}" for note in table.notes), ""])


def as_latex(table: ComparisonTable) -> str:
    """Returns a ``table`` of LaTeX that needs no package; the notes are in the caption."""
    columns = f"rl{'r' * (len(table.headings) - 2)}"
    lines = [r"\begin{table}", rf"\caption{{{_tex(' '.join([f'{table.title}.', *table.notes]))}}}"]
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\hline", _tex_row(table.headings)]
    for part in table.parts:
        lines += [r"\hline", rf"\multicolumn{{{len(table.headings)}}}{{l}}{{\textit{{{_tex(part.title)}}}}} \\"]
        lines += [_tex_row(row) for row in part.rows]
    return "\n".join([*lines, r"\hline", r"\end{tabular}", r"\end{table}", ""])


WRITERS: Mapping[str, Callable[[ComparisonTable], str]] = {".csv": as_csv, ".md": as_markdown, ".tex": as_latex}
"""Ending of a file to what makes its text."""


def write_tables(table: ComparisonTable, stem: Path) -> list[Path]:
    """Writes the table in every form beside each other, each file whole or not at all, and returns where.

    Args:
        table: of a comparison.
        stem: path without its ending.
    """
    paths = []
    for ending, text in WRITERS.items():
        paths.append(stem.with_name(f"{stem.name}{ending}"))
        with staged_file(paths[-1]) as temporary:
            temporary.write_text(text(table), encoding="utf-8")
    return paths


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Returns text in which Markdown sees no markup."""
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)


def _tex_row(cells: Sequence[str]) -> str:
    return rf"{' & '.join(map(_tex, cells))} \\"


def _tex(text: str) -> str:
    """Returns text in which LaTeX sees no commands."""
    marks = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    return re.sub(r"[\\~^±&%$#_{}]", lambda match: marks.get(match[0], f"\\{match[0]}"), text)
