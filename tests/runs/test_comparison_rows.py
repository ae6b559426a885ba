"""Rows of a comparison: a grid crosses methods, a key is for whom it names, and words that change nothing give no row."""

from pathlib import Path

import pytest
from running import METHODS

from adamerge.errors import ConfigError
from adamerge.runs.command_line import Words
from adamerge.runs.comparison_rows import is_run, pool_words, rows_of, with_words

POOL, LAYER, TIES, STAGED = (
    Path("pool.yaml"),
    Path("layer.yaml"),
    Path("ties.yaml"),
    METHODS / "expert_merging_plusplus",
)


def named(methods, *grid, shared=()):
    return {row.name: row.words.overrides for row in rows_of(POOL, methods, Words([], list(shared)), grid)}


def test_without_a_grid_each_method_is_a_row():
    assert named([LAYER, TIES], shared=["--a=1"]) == {"layer": ["--a=1"], "ties": ["--a=1"]}


def test_grids_cross_each_other_and_the_methods():
    rows = named([LAYER, TIES], "model.search.lr=1e-3,1e-2", "trainer.max_steps=1,2")
    cells = [(rate, steps) for rate in ("1e-3", "1e-2") for steps in ("1", "2")]
    assert list(rows) == [f"{m} lr={rate} max_steps={steps}" for m in ("layer", "ties") for rate, steps in cells]
    assert rows["ties lr=1e-2 max_steps=1"] == ["--model.search.lr=1e-2", "--trainer.max_steps=1"]


def test_a_grid_of_one_method_leaves_the_others_as_they_are():
    assert list(named([LAYER, TIES], "layer:model.search.lr=1,2")) == ["layer lr=1", "layer lr=2", "ties"]


def test_lists_are_not_divided_and_keys_that_end_alike_are_told_whole():
    rows = named([LAYER], "data.only=[a,b],[c]", "x.only=1,2")
    cells = [(data, x) for data in ("[a,b]", "[c]") for x in (1, 2)]
    assert list(rows) == [f"layer data.only={data} x.only={x}" for data, x in cells]


def test_one_value_is_a_setting_and_no_part_of_the_name():
    rows = named([LAYER, TIES], "layer:model.search.lr=1e-2", "trainer.max_steps=1,2")
    assert list(rows) == ["layer max_steps=1", "layer max_steps=2", "ties max_steps=1", "ties max_steps=2"]
    assert rows["layer max_steps=2"] == ["--model.search.lr=1e-2", "--trainer.max_steps=2"]


def test_a_stages_key_gives_methods_without_stages_no_further_row():
    rows = named([LAYER, STAGED], "2.model.search.lr=1,2")
    assert list(rows) == ["layer", "expert_merging_plusplus lr=1", "expert_merging_plusplus lr=2"]


@pytest.mark.parametrize("text", ["lr", "=3", "other:lr=1", "lr="])
def test_what_is_no_grid(text):
    with pytest.raises(ConfigError, match="--grid"):
        named([LAYER], text)


def test_two_methods_of_one_name():
    with pytest.raises(ConfigError, match="same name"):
        named([LAYER, Path("other/layer.yaml")])


def test_what_is_of_the_pool():
    words = ["--data.seed=1", "--model.search.lr=1", "--tasks=[a]", "--database=1", "--2.data.seed=3", "--data=null"]
    found = pool_words(POOL, Words(["more.yaml"], words))
    assert found.files == ["pool.yaml", "more.yaml"]
    assert found.overrides[1:] == ["--data.seed=1", "--tasks=[a]", "--data=null"]


def test_words_are_added_behind():
    first = Words(["a"], ["--x=1"])
    assert with_words(first, "--x=2").overrides == ["--x=1", "--x=2"] and first.overrides == ["--x=1"]


def test_a_run_has_coefficients_and_a_configuration(tmp_path):
    assert not is_run(tmp_path) and not is_run(STAGED)
    for name in ("coefficients.safetensors", "config.yaml"):
        assert not is_run(tmp_path)
        (tmp_path / name).touch()
    assert is_run(tmp_path)
