"""The figure of a comparison: every method whose seconds are known is on it by its number, and references are lines."""

from matplotlib.figure import Figure

from adamerge.runs.comparison_figure import FASTEST, draw_comparison
from runs.test_comparison_table import planted


def test_points_and_names(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *given, **more: (drawn.append(self), save(self, *given, **more))
    )
    result = planted()
    result["methods"]["ties"]["costs"] = result["methods"]["ties"]["costs"] | {"seconds": 0.0}
    draw_comparison(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log"
    names = ["told", "large", "smaller", "small", "ties"]  # from the best on
    listed = "\n".join(f"{number}  {name}" for number, name in enumerate(names, 1))
    assert sorted(text.get_text() for text in axes.texts) == sorted(
        [*"12345", "task_arithmetic_tuned", "individual", listed]
    )
    points = {(x, round(y, 6)) for line in axes.containers for x, y in zip(*line.lines[0].get_data(), strict=True)}
    assert points == {(FASTEST, 55.0), (2.5, 60.0), (2.5, 70.0), (2.5, 80.0), (2.5, 95.0)}


def test_nothing_known_is_an_empty_picture(tmp_path):
    result = planted()
    result["methods"] = {name: row for name, row in result["methods"].items() if row["section"] == "reference"}
    draw_comparison(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0
