"""Table files: the same cells in each form, and no cell that its form would take for markup."""

import csv
import re

from adamerge.runs.comparison_table import ComparisonTable, Part
from adamerge.runs.table_files import WRITERS, as_csv, as_latex, as_markdown, write_tables

TABLE = ComparisonTable(
    "accuracy, %",
    ["rank", "method", "average", "± seeds"],
    [
        Part("no data", [["1", "ties_a|b", "62.4", ""]]),
        Part("labelled, at most 1%", [["1", "x & y_{2}", "+1.0", "0.1"]]),
    ],
    ["gap closed: 5 % of a_b."],
)
CELLS = [["1", "ties_a|b", "62.4", ""], ["1", "x & y_{2}", "+1.0", "0.1"]]


def test_csv_has_a_line_a_row_and_its_part():
    rows = list(csv.reader(as_csv(TABLE).splitlines()))
    assert rows[0] == ["part", *TABLE.headings]
    assert rows[1:] == [["no data", *CELLS[0]], ["labelled, at most 1%", *CELLS[1]]]


def test_markdown_has_as_many_cells_in_every_line_of_the_table():
    lines = as_markdown(TABLE).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(TABLE.headings) + 1}
    assert lines[0] == "**accuracy, %**" and lines[-1] == r"- gap closed: 5 % of a\_b."
    assert r"| 1 | ties\_a\|b | 62.4 |  |" in rows and "|  | **no data** |  |  |" in rows


def test_latex_takes_no_cell_for_a_command():
    text = as_latex(TABLE)
    assert r"1 & x \& y\_\{2\} & +1.0 & 0.1 \\" in text and r"\caption{accuracy, \%. gap closed: 5 \% of a\_b.}" in text
    assert r"rank & method & average & $\pm$ seeds \\" in text and r"\begin{tabular}{rlrr}" in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def test_all_forms_are_written_beside_each_other(tmp_path):
    paths = write_tables(TABLE, tmp_path / "comparison.v1")
    assert [path.name for path in paths] == [f"comparison.v1{ending}" for ending in WRITERS]
    assert [path.read_text() for path in paths] == [write(TABLE) for write in WRITERS.values()]
