"""The heat map: a picture of every group, in the order of the blocks, with the means of their chunks."""

import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image

from adamerge.artifacts.heatmap import draw_heatmap
from adamerge.errors import ExportError

TABLE = {f"visual.transformer.resblocks.{n}.ln_1.weight": {"a": [0.1 * n], "b": [0.3, 0.5]} for n in range(11)}


def test_heat_map_is_a_picture_of_every_group(tmp_path):
    path = tmp_path / "heatmap.png"
    draw_heatmap(TABLE, path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        width, height = picture.size
        colours = picture.convert("RGB").getcolors(1 << 24)
    assert 300 < width < 3000 and 300 < height < 3000 and 2000 < path.stat().st_size < 500_000
    assert len(colours) > 20, "an empty picture"
    draw_heatmap({f"g{n}": {"a": [0.3], "b": [0.2]} for n in range(60)}, path)
    with Image.open(path) as picture:
        assert picture.size[1] > height, "more groups need a taller picture"


@pytest.mark.parametrize("value", [0.0, 0.3, -1.0])
def test_heat_map_of_one_number(value, tmp_path):
    draw_heatmap({"model": {"a": [value]}}, tmp_path / "heatmap.png", "not learned")
    assert (tmp_path / "heatmap.png").stat().st_size > 1000


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The figure that is written for a table."""
    figures, plain = [], Figure.savefig

    def savefig(self, *args, **more):
        figures.append(self)
        return plain(self, *args, **more)

    monkeypatch.setattr(Figure, "savefig", savefig)

    def draw(table):
        draw_heatmap(table, tmp_path / "drawn.png")
        return figures[-1].axes[0]

    return draw


def test_block_10_stands_below_block_9(drawn):
    """Whatever order the table has; names without numbers keep the alphabet's."""
    names = [f"resblocks.{block}.attn.{part}" for block in range(12) for part in ("in_proj", "out_proj")]
    wanted = [*names, "visual.class_embedding", "visual.proj"]
    axes = drawn({name: {"b": [0.1], "a": [0.2]} for name in sorted(wanted, reverse=True)})
    assert [label.get_text() for label in axes.get_yticklabels()] == wanted
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first block stands on top"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["b", "a"], "experts as the table has them"


def test_a_cell_is_the_mean_of_its_chunks(drawn):
    axes = drawn({"g.10": {"a": [0.25], "b": [-0.5, 0.0, 0.2]}, "g.9": {"a": [0.0, 1.0], "b": [0.75, 0.25]}})
    values = axes.images[0].get_array()
    assert values.tolist() == [[0.5, 0.5], [0.25, pytest.approx(-0.1)]]
    written = [(text.get_position(), text.get_text()) for text in axes.texts]
    assert written == [((0, 0), "0.50"), ((1, 0), "0.50"), ((0, 1), "0.25"), ((1, 1), "-0.10")]
    assert axes.images[0].get_clim() == (pytest.approx(-0.1), 0.5), "every value has a colour of its own"


def test_no_figure_stays_open_and_a_picture_that_cannot_be_written_is_told(tmp_path):
    draw_heatmap(TABLE, tmp_path / "heatmap.png")
    assert pyplot.get_fignums() == []
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match=r"heatmap\.png"):
        draw_heatmap(TABLE, tmp_path / "file" / "heatmap.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "heatmap.png"]
    pyplot.close("all")
