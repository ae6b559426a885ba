"""The heat map: colours that show signs, labels that can be read, a mark for what is no number, one file at once."""

from __future__ import annotations

import warnings

import numpy
import pytest
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from adamerge.artifacts.heatmap import DPI, draw_heatmap, scale_of
from adamerge.errors import ExportError

from .test_colour_scale import SCALES
from .test_heatmap_cells import MISTRAL, VIT

NAN = float("nan")
EIGHT = ["sun397", "stanford_cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]
BLOCKS = ["visual", *(f"visual.transformer.resblocks.{block}" for block in range(12))]
PROJECTIONS = [name for name in MISTRAL if "_proj." in name]
T5 = ["shared.weight"] + [
    f"{side}.block.{block}.layer.0.{kind}.weight" for side in ("encoder", "decoder") for block in range(12) for kind in "qkvo"
]  # fmt: skip


def table_of(names, experts, low=-0.2, high=0.6, chunks=1):
    numbers = numpy.random.default_rng(0)
    return {name: {task: numbers.uniform(low, high, chunks).tolist() for task in experts} for name in sorted(names)}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Gives the figure that would be written; making a file of it would take as long again."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **more: figures.append(self) or path.touch())

    def draw(table, *title, **more):
        draw_heatmap(table, tmp_path / "drawn.png", *title, **more)
        return figures[-1]

    return draw


def maps(figure):
    """The axes that show cells."""
    return [axes for axes in figure.axes if axes.collections and isinstance(axes.collections[0], PolyCollection)]


def cells(axes):
    """The drawn values with those of the margins, by the labels of row and column."""
    rows = dict(zip(numpy.round(axes.get_yticks(), 6), rows_of(axes), strict=True))
    columns = dict(zip(numpy.round(axes.get_xticks(), 6), labels(axes.get_xticklabels()), strict=True))
    drawn = axes.collections[0]
    places = [path.vertices[:4].mean(axis=0).round(6) for path in drawn.get_paths()]
    found = {(rows[y], columns[x]): value for (x, y), value in zip(places, drawn.get_array(), strict=True)}
    assert len(found) == len(places)
    return found


def labels(ticks):
    return [label.get_text() for label in ticks]


def rows_of(axes):
    """Its labels, or those of a map to its left."""
    every = [labels(other.get_yticklabels()) for other in axes.figure.axes]
    own = labels(axes.get_yticklabels())
    return own if any(own) else next(rows for rows in every if any(rows) and len(rows) == len(own))


def texts(figure):
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


CASES = {
    "vision": (table_of(VIT, EIGHT), {"order": VIT}),
    "language": (table_of(PROJECTIONS, ["instruct", "math", "code"]), {"order": MISTRAL}),
    "language, chunks": (table_of(MISTRAL, ["instruct", "math", "code"], chunks=5), {"order": MISTRAL}),
    "language, 20 experts": (table_of(MISTRAL, [f"expert_{n}" for n in range(20)]), {"order": MISTRAL}),
    "one expert": (table_of(VIT, ["cars"]), {"order": VIT}),
    "two stacks": (table_of(T5, ["sst2", "$x^$"]), {"order": T5}),
    "small blocks": (table_of([name for name in VIT if not any(f".{n}." in name for n in range(3, 12))], EIGHT), {}),
    "blocks": (table_of(BLOCKS, EIGHT), {"order": VIT}),
    "tasks": (table_of(["model", "$x^$"], [*EIGHT, "$x^$"]), {"order": VIT}),
    "one tensor": (table_of(["fc.weight"], ["a", "b"]), {}),
    "one number": ({"model": {"a": [0.0]}}, {}),
    "no blocks": (table_of([f"module_{letter}.weight" for letter in "abcdefghijkl"], EIGHT), {}),
    "tiny and huge": ({f"h.{n}.w": {"a": [1e-12 * n], "b": [-1e9 * n]} for n in range(3)}, {}),
    "masks": (table_of(["model"], EIGHT), {"order": VIT, "masks": dict.fromkeys(VIT, (0.3, 0.1))}),
    "odd": (
        table_of(VIT, EIGHT) | {VIT[0]: {task: [NAN] for task in EIGHT}, VIT[9]: {task: [float("-inf")] for task in EIGHT}},
        {"order": VIT, "held": {name: EIGHT[:2] for name in VIT if "in_proj_bias" in name}},
    ),
    "long names": (table_of([f"{'m' * 90}.{n}.{kind * 90}" for n in (0, 1) for kind in "ab"], ["$x^" * 40, "a\nb"]), {}),
}  # fmt: skip


SLOW = {"language", "language, 20 experts", "one expert", "small blocks", "one tensor", "no blocks"}


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_all_labels_can_be_read_and_none_covers_another(case, drawn):
    table, more = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = drawn(table, "Merging coefficients after 500 steps", **more)
    figure.set_dpi(DPI)
    renderer = FigureCanvasAgg(figure).get_renderer()
    written = texts(figure)
    assert min(text.get_fontsize() for text in written) >= 6
    boxes = numpy.array([text.get_window_extent(renderer).extents for text in written])
    width, height = figure.get_size_inches() * DPI
    assert boxes[:, :2].min() >= 0 and boxes[:, 2].max() <= width and boxes[:, 3].max() <= height, "all on the picture"
    left, low, right, high = (boxes + numpy.array([0.5, 0.5, -0.5, -0.5])).T
    apart = (right[:, None] < left) | (left[:, None] > right) | (high[:, None] < low) | (low[:, None] > high)
    numpy.fill_diagonal(apart, True)
    assert apart.all(), [(written[a].get_text(), written[b].get_text()) for a, b in numpy.argwhere(~apart)[:5]]


def test_every_expert_has_its_map_and_all_share_a_scale(drawn):
    table = table_of(VIT, EIGHT)
    figure = drawn(table, order=VIT)
    found = maps(figure)
    assert [axes.get_title(loc="left") for axes in found] == [*EIGHT, "mean of 8 experts"]
    assert len({(axes.collections[0].norm.vmin, axes.collections[0].norm.vmax) for axes in found}) == 1
    for axes, task in zip(found, EIGHT, strict=False):
        values = cells(axes)
        assert values["mlp.c_fc.weight", "10"] == table["visual.transformer.resblocks.10.mlp.c_fc.weight"][task][0]
        assert values["visual.proj", "out"] == table["visual.proj"][task][0]
        own = [of[task][0] for of in table.values()]
        assert values["mean", "mean"] == pytest.approx(numpy.mean(own)), "of an expert"
        tenth = [of[task][0] for name, of in table.items() if ".resblocks.10." in name]
        assert values["mean", "10"] == pytest.approx(numpy.mean(tenth)), "of a depth"
        kind = [of[task][0] for name, of in table.items() if name.endswith("ln_1.bias")]
        assert values["ln_1.bias", "mean"] == pytest.approx(numpy.mean(kind)), "of a kind"
        assert len(values) == 152 + 20 + 14 + 1
    everyone = cells(found[-1])
    assert everyone["visual.proj", "out"] == pytest.approx(numpy.mean([table["visual.proj"][task] for task in EIGHT]))


def test_changing_one_coefficient_changes_its_cell_and_the_means_it_is_in(drawn):
    table = table_of(VIT, EIGHT)
    before = [cells(axes) for axes in maps(drawn(table, order=VIT))]
    table["visual.transformer.resblocks.10.ln_1.bias"]["svhn"] = [0.123]
    after = [cells(axes) for axes in maps(drawn(table, order=VIT))]
    own = {("ln_1.bias", "10"), ("ln_1.bias", "mean"), ("mean", "10"), ("mean", "mean")}
    changed = [{place for place in x if x[place] != y[place]} for x, y in zip(before, after, strict=True)]
    assert changed == [own if task in ("svhn", "mean") else set() for task in [*EIGHT, "mean"]]


def test_block_10_stands_after_block_9_and_experts_as_in_the_table(drawn):
    (axes,) = maps(drawn({f"h.{n}.w": {"b": [0.1 * n], "a": [-0.1]} for n in (10, 9, 1)}))
    assert labels(axes.get_xticklabels()) == ["1", "9", "10", "mean"]
    assert labels(axes.get_yticklabels()) == ["b", "a", "mean"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first stands on top"
    assert cells(axes)["b", "9"] == pytest.approx(0.9) and cells(axes)["mean", "9"] == pytest.approx(0.4)


@pytest.mark.parametrize(("values", "low", "high", "words"), SCALES)
def test_colours_show_signs_and_the_bar_says_how(values, low, high, words, drawn):
    scale = scale_of(numpy.array(values))
    assert (scale.low, scale.high, scale.words) == (low, high, f"coefficient: {words}")
    figure = drawn({f"h.{n}": {"a": [value]} for n, value in enumerate(values or [NAN])})
    assert f"coefficient: {words}" in [text.get_text() for text in texts(figure)]


def test_a_negative_cell_is_red_a_zero_white_and_a_positive_one_blue(drawn):
    figure = drawn({"h.0": {"a": [-1.0]}, "h.1": {"a": [0.0]}, "h.2": {"a": [0.5]}})
    (axes,) = maps(figure)
    figure.draw_without_rendering()
    negative, zero, positive, _ = (colour[:3] for colour in axes.collections[0].get_facecolors())
    assert negative[0] > negative[2] + 0.25 and positive[2] > positive[0] + 0.25 and min(zero) > 0.95


def test_what_was_held_is_grey_and_what_is_not_finite_is_crossed_and_both_are_told(drawn):
    table = {f"h.{n}.{part}": {"a": [0.5], "b": [0.25]} for n in range(2) for part in "wv"}
    plain = [text.get_text() for text in texts(drawn(table))]
    assert not any("Grey" in text or "not finite" in text for text in plain)
    table["h.1.w"]["a"] = [0.5, NAN]
    figure = drawn(table, held={"h.0.v": ["a"]})
    first = maps(figure)[0]
    assert cells(first) == {
        ("w", "0"): 0.5, ("v", "1"): 0.5, ("w", "mean"): 0.5, ("v", "mean"): 0.5,
        ("mean", "0"): 0.5, ("mean", "1"): 0.5, ("mean", "mean"): 0.5,
    }  # fmt: skip
    grey, crossed = first.collections[1:]
    assert [to_hex(colour) for colour in grey.get_facecolor()] == ["#cccccc"]
    assert len(crossed.get_paths()) == 1 and "x" in [text.get_text() for text in first.texts]
    words = " ".join(text.get_text() for text in texts(figure))
    assert "Grey: held, not learned" in words and "x: not finite" in words


def test_the_spread_of_several_coefficients_of_a_tensor_is_told(drawn):
    table = {"h.0.w": {"a": [0.1, 0.3], "b": [0.5, 0.5]}, "h.0.v": {"a": [0.2], "b": [0.4]}}
    words = " ".join(text.get_text() for text in texts(drawn(table)))
    assert "0.05 on average, 0.1 at most (a, h.0.w)" in words
    assert "deviation" not in " ".join(text.get_text() for text in texts(drawn({"h.0.w": {"a": [0.1]}})))


def test_a_mask_has_a_map_and_a_scale_of_its_own(drawn):
    figure = drawn({"model": {"a": [0.5], "b": [0.25]}}, masks=dict.fromkeys(VIT, (0.75, 1.0)), order=VIT)
    experts, mask = maps(figure)
    assert cells(experts) == {("a", "model"): 0.5, ("b", "model"): 0.25, ("mean", "model"): 0.375}
    values = cells(mask)
    assert len(values) == 152 + 20 + 14 + 1 and set(values.values()) == {0.75}
    assert (mask.collections[0].norm.vmin, mask.collections[0].norm.vmax) == (0, 1)


def test_numbers_stand_in_cells_where_there_is_room_and_always_in_the_means(drawn):
    (axes,) = maps(drawn({"h.0": {"a": [0.5]}, "h.1": {"a": [-0.001]}}))
    assert sorted(text.get_text() for text in axes.texts) == ["0.00", "0.25", "0.50"], "and no -0.00"
    axes = maps(drawn(table_of(VIT, EIGHT), order=VIT))[0]
    assert len(axes.texts) == 20 + 14 + 1


def test_without_coefficients_it_says_so(drawn):
    assert "There are no coefficients." in [text.get_text() for text in texts(drawn({}))]


@pytest.mark.parametrize("experts", [["a"], EIGHT])
def test_a_picture_has_a_size_that_can_be_looked_at(experts, tmp_path):
    draw_heatmap(table_of(VIT, experts), tmp_path / "heatmap.png", order=VIT)
    with Image.open(tmp_path / "heatmap.png") as picture:
        assert picture.format == "PNG"
        assert 500 < picture.size[0] < 3000 and 300 < picture.size[1] < 2000
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20, "an empty picture"
    assert 2000 < (tmp_path / "heatmap.png").stat().st_size < 500_000


def test_no_figure_stays_open_and_a_picture_that_cannot_be_written_is_told(tmp_path):
    draw_heatmap(table_of(BLOCKS, EIGHT), tmp_path / "heatmap.png")
    assert pyplot.get_fignums() == []
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"heatmap\.png"):
        draw_heatmap(table_of(BLOCKS, EIGHT), tmp_path / "file" / "heatmap.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "heatmap.png"]
    pyplot.close("all")
