"""The figure of a comparison: a bar for every row, and every method whose seconds are known is a point by its number."""

import pytest
from matplotlib.figure import Figure

from adamerge.runs.comparison_figure import FASTEST, draw_comparison
from runs.test_comparison_table import planted


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *given, **more: (figures.append(self), save(self, *given, **more))
    )
    return figures


def test_bars_and_points(tmp_path, drawn):
    result = planted()
    result["methods"]["ties"]["costs"] = result["methods"]["ties"]["costs"] | {"seconds": 0.0}
    draw_comparison(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    bars, points = drawn[0].axes
    scores = {name: 100 * row["average"] for name, row in result["methods"].items()}
    best_first = ["told", "individual", "large", "smaller", "old", "small", "ties", "task_arithmetic_tuned",
                  "task_arithmetic_0.3", "pretrained"]  # fmt: skip
    named = [tick.get_text() for tick in bars.get_yticklabels()]
    assert named == [f"{name}  {number}" for number, name in enumerate(best_first, 1)]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([scores[name] for name in best_first])
    assert points.get_xscale() == "log"
    told = [text.get_text() for text in points.texts]
    assert sorted(told) == sorted(["1", "3", "4", "6", "7", "task_arithmetic_tuned", "individual"])
    found = {
        (x, round(y, 6))
        for line in points.lines
        if line.get_linestyle() == "None"
        for x, y in zip(*line.get_data(), strict=True)
    }
    assert found == {(FASTEST, 55.0), (2.5, 60.0), (2.5, 70.0), (2.5, 80.0), (2.5, 95.0)}


def test_where_less_is_better_the_least_is_first(tmp_path, drawn):
    result = planted()
    result["metric"] |= {"higher_is_better": False, "factor": 1.0}
    draw_comparison(result, tmp_path / "figure.png")
    assert drawn[0].axes[0].get_yticklabels()[0].get_text() == "pretrained  1"


def test_references_alone_are_drawn(tmp_path):
    result = planted()
    result["methods"] = {name: row for name, row in result["methods"].items() if row["section"] == "reference"}
    draw_comparison(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0
