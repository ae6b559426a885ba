"""Cells of the heat map: each group in the row of its kind and the column of its depth; means of what is learned, finite."""

from __future__ import annotations

import numpy
import pytest

from adamerge.artifacts.heatmap_cells import MOST_KINDS, arrange, panels_of, with_means

NORM, ATTENTION = ("weight", "bias"), ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
VIT_KINDS = [
    *(f"ln_1.{part}" for part in NORM),
    *(f"attn.{part}" for part in ATTENTION),
    *(f"ln_2.{part}" for part in NORM),
    *(f"mlp.{layer}.{part}" for layer in ("c_fc", "c_proj") for part in NORM),
]
VIT = [
    *(f"visual.{name}" for name in ("class_embedding", "positional_embedding", "proj", "conv1.weight")),
    *(f"visual.ln_pre.{part}" for part in NORM),
    *(f"visual.transformer.resblocks.{block}.{kind}" for block in range(12) for kind in VIT_KINDS),
    *(f"visual.ln_post.{part}" for part in NORM),
]
MISTRAL_KINDS = [
    *(f"self_attn.{letter}_proj.weight" for letter in "qkvo"),
    *(f"mlp.{way}_proj.weight" for way in ("gate", "up", "down")),
    *(f"{place}_layernorm.weight" for place in ("input", "post_attention")),
]
MISTRAL = [
    "model.embed_tokens.weight",
    *(f"model.layers.{layer}.{kind}" for layer in range(32) for kind in MISTRAL_KINDS),
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.mark.slow
def test_the_names_are_those_of_the_libraries():
    import open_clip
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    network = open_clip.create_model("ViT-B-32", device="meta").visual
    assert [name for name, _ in network.named_parameters(prefix="visual")] == VIT and len(VIT) == 152
    with torch.device("meta"):
        network = MistralForCausalLM._from_config(MistralConfig())
    assert [name for name, _ in network.named_parameters()] == MISTRAL
    assert len([name for name in MISTRAL if "_proj." in name]) == 224


def test_a_vision_transformer_has_its_blocks_across_and_its_kinds_down():
    grid = arrange(sorted(VIT), VIT)
    first = ["visual.class_embedding", "visual.positional_embedding", "visual.conv1.weight"]
    first += ["visual.ln_pre.weight", "visual.ln_pre.bias"]
    last = ["visual.proj", "visual.ln_post.weight", "visual.ln_post.bias"]
    assert grid.rows == [*first, *VIT_KINDS, *last]
    assert grid.columns == ["in", *map(str, range(12)), "out"]
    assert grid.stacks == ["visual.transformer.resblocks"]
    assert len(set(grid.cells.values())) == 152, "each has a cell of its own"
    assert grid.cells["visual.transformer.resblocks.10.mlp.c_fc.weight"] == (grid.rows.index("mlp.c_fc.weight"), 11)
    assert grid.cells["visual.class_embedding"] == (0, 0) and grid.cells["visual.ln_post.bias"] == (19, 13)


def test_a_language_model_too():
    grid = arrange(sorted(MISTRAL), MISTRAL)
    assert grid.rows == ["model.embed_tokens.weight", *MISTRAL_KINDS, "model.norm.weight", "lm_head.weight"]
    assert grid.columns == ["in", *map(str, range(32)), "out"]
    projections = [name for name in MISTRAL if "_proj." in name]
    grid = arrange(projections, MISTRAL)
    assert grid.rows == MISTRAL_KINDS[:7] and grid.columns == list(map(str, range(32)))
    assert sorted(grid.cells.values()) == [(row, column) for row in range(7) for column in range(32)]


@pytest.mark.parametrize("names", [VIT, MISTRAL], ids=["vision", "language"])
def test_the_order_of_the_table_does_not_matter_where_that_of_the_network_is_known(names):
    assert arrange(reversed(names), names) == arrange(sorted(names), names) == arrange(names, names)


@pytest.mark.parametrize("names", [VIT, MISTRAL], ids=["vision", "language"])
def test_without_the_networks_order_depth_goes_by_number_and_what_is_outside_by_what_it_is_called(names):
    known, alone = arrange(names, names), arrange(sorted(names))
    assert alone.columns == known.columns and sorted(alone.rows) == sorted(known.rows)
    for name in names:
        assert alone.cells[name][1] == known.cells[name][1], name
    sides = [
        alone.columns[min(at for (row, at) in alone.cells.values() if row == place)] for place in range(len(alone.rows))
    ]
    assert sides == sorted(sides, key=["in", "0", "out"].index), (
        "rows: first what is before the blocks, at last what is after"
    )


def test_two_stacks_stand_side_by_side_each_with_what_is_before_and_after_it():
    kinds = ["layer.0.SelfAttention.q.weight", "layer.1.layer_norm.weight"]
    names = ["shared.weight"]
    for stack in ("encoder", "decoder"):
        names += [f"{stack}.block.{block}.{kind}" for block in range(11) for kind in kinds]
        names += [f"{stack}.final_layer_norm.weight"]
    names += ["decoder.block.0.layer.2.wi.weight", "unheard_of", "lm_head.weight"]
    grid = arrange(sorted(names), names)
    numbers = list(map(str, range(1, 11)))
    assert grid.columns == ["in", "encoder 0", *numbers, "out", "decoder 0", *numbers, "out"]
    last = ["encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight", "unheard_of", "lm_head.weight"]
    assert grid.rows == ["shared.weight", *kinds, "layer.2.wi.weight", *last]
    assert grid.cells["encoder.final_layer_norm.weight"][1] == 12 and grid.cells["unheard_of"][1] == 24
    assert grid.cells["lm_head.weight"][1] == 24, "what is near to none goes with the last"
    assert grid.stacks == ["encoder.block", "decoder.block"]


def test_stages_are_part_of_the_depth_and_numbers_inside_a_block_are_not():
    names = [
        f"swin.layers.{stage}.blocks.{block}.{kind}" for stage in range(2) for block in (0, 2, 10) for kind in "ab"
    ]
    names += ["swin.layers.0.downsample.weight", "layer1.weight"]
    grid = arrange(names)
    assert grid.columns == ["0", "0.0", "0.2", "0.10", "1.0", "1.2", "1.10", "out"]
    assert grid.rows == ["a", "b", "downsample.weight", "layer1.weight"]
    grid = arrange(["h.3.experts.7.w1.weight", "h.3.experts.11.w1.weight", "h.20.experts.7.w1.weight"])
    assert grid.columns == ["3", "20"] and grid.rows == ["experts.7.w1.weight", "experts.11.w1.weight"]


def test_very_many_kinds_that_differ_in_a_number_share_a_row():
    names = [
        f"h.{block}.experts.{expert}.{part}"
        for block in range(2)
        for expert in range(MOST_KINDS)
        for part in ("w1", "w2")
    ]
    grid = arrange(names)
    assert grid.rows == ["experts.*.w1", "experts.*.w2"] and len(grid.cells) == len(names)
    table = {name: {"a": [float(name.endswith("w2")) + float(".7." in name)]} for name in names}
    (panel,) = panels_of(table, grid, {})
    assert panel.values.tolist() == [[pytest.approx(1 / MOST_KINDS)] * 2, [pytest.approx(1 + 1 / MOST_KINDS)] * 2]
    (panel,) = panels_of(table, grid, {name: ["a"] for name in names if ".7." not in name or name.startswith("h.1")})
    assert panel.values.tolist() == [[1, None], [2, None]] and panel.marks.tolist() == [[0, 1], [0, 1]], (
        "held where all are"
    )


def test_blocks_of_one_kind_need_one_row():
    blocks = [f"visual.transformer.resblocks.{block}" for block in range(12)]
    grid = arrange(sorted([*blocks, "visual"]), VIT)
    assert grid.rows == [""] and grid.columns == ["visual (rest)", *map(str, range(12))]
    assert [grid.cells[block] for block in blocks] == [(0, at) for at in range(1, 13)]
    assert arrange(["lm_head", "model", "model.layers.10", "model.layers.9"], MISTRAL).columns == [
        "model (rest)", "9", "10", "lm_head",
    ]  # fmt: skip


def test_a_network_without_blocks_keeps_its_order():
    names = ["norm.weight", "fc.weight", "embedding", "a"]
    assert arrange(sorted(names), names).columns == names
    assert arrange(["b", "a", "c"], ["c"]).columns == ["c", "b", "a"], "unknown ones come last, as they are given"
    assert arrange(["model"], VIT) == ([""], ["model"], {"model": (0, 0)}, [])
    assert arrange([f"{'1' * 5000}.weight"]).columns == [f"{'1' * 5000}.weight"], "too long to be a number"
    assert arrange(["2.a", "10.a"]).columns == ["2", "10"]


def test_a_cell_is_the_mean_of_what_was_learned_and_is_finite():
    nan, inf = float("nan"), float("inf")
    table = {
        "h.0.w": {"a": [0.0, 0.5, 1.0], "b": [-0.25]},
        "h.0.b": {"a": [0.75], "b": [inf, 0.0]},
        "h.1.w": {"a": [1.0], "b": [nan]},
        "h.1.b": {"a": [0.0], "b": []},
    }
    grid = arrange(table)
    a, b, mean = panels_of(table, grid, {"h.1.w": ["a", "b"]})
    assert [panel.title for panel in (a, b, mean)] == ["a", "b", "mean of 2 experts"]
    assert a.values.tolist() == [[0.5, None], [0.75, 0.0]] and a.marks.tolist() == [[0, 1], [0, 0]]
    assert b.values.tolist() == [[-0.25, None], [None, None]] and b.marks.tolist() == [[0, 2], [2, 0]]
    assert mean.values.tolist() == [[0.125, None], [0.75, 0.0]] and mean.marks.tolist() == [[0, 1], [0, 0]]


def test_experts_are_the_rows_where_there_is_one_kind_and_stand_as_in_the_table():
    table = {"h.1": {"b": [1.0], "a": [2.0]}, "h.0": {"b": [3.0], "a": [4.0]}}
    (panel,) = panels_of(table, arrange(table), {})
    assert panel.rows == ["b", "a"] and panel.values.tolist() == [[3.0, 1.0], [4.0, 2.0]]


@pytest.mark.parametrize("place", [0, 60, 151])
def test_changing_one_coefficient_changes_exactly_its_cell(place):
    numbers = numpy.random.default_rng(0)
    table = {name: {task: numbers.normal(size=2).tolist() for task in "abc"} for name in sorted(VIT)}
    grid = arrange(table, VIT)
    before = panels_of(table, grid, {})
    table[VIT[place]]["b"][1] += 1.0
    after = panels_of(table, grid, {})
    changed = [
        numpy.argwhere((x.values != y.values).filled(False)).tolist() for x, y in zip(before, after, strict=True)
    ]
    cell = [list(grid.cells[VIT[place]])]
    assert changed == [[], cell, [], cell], "its own panel's, and that of the mean of the experts"
    assert after[1].values[grid.cells[VIT[place]]] - before[1].values[grid.cells[VIT[place]]] == pytest.approx(0.5)


def test_means_are_of_what_is_there():
    values = numpy.ma.masked_invalid([[1.0, 3.0], [5.0, numpy.nan], [numpy.nan, numpy.nan]])
    assert with_means(values).tolist() == [[1, 3, 2], [5, None, 5], [None, None, None], [3, 3, 3]]
    assert with_means(values[:1]).tolist() == [[1, 3, 2]] and with_means(values[:, :1]).tolist() == [
        [1],
        [5],
        [None],
        [3],
    ]
    assert with_means(values[:1, :1]).tolist() == [[1]]
