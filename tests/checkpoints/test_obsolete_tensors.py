"""Leftovers: what older versions saved is no part of a merge where one side lacks it, and parameters of like names are."""

from pathlib import Path

import pytest
import torch
from pico import pico_pool
from safetensors.torch import load_file, save_file
from torch import nn
from toys import ToyLanguage

from adamerge import LayerWise, MergedModel, TaskVectors
from adamerge.artifacts.coefficients import Coefficients
from adamerge.artifacts.export import export
from adamerge.checkpoints.checkpoint import StateDict
from adamerge.checkpoints.obsolete_tensors import is_leftover, leftovers
from adamerge.errors import CheckpointError
from adamerge.runs.pool import open_pool

MASK = torch.ones(48, 48).tril()[None, None]
OLD = {
    "gpt2": {"transformer.h.0.attn.bias": MASK, "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)},
    "qwen2": {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
        "model.layers.1.self_attn.rotary_emb.cos_cached": torch.rand(1, 1, 48, 8),
    },
}


def add(folder, tensors) -> None:
    path = Path(folder) / "model.safetensors"
    save_file({**load_file(path), **tensors}, path, {"format": "pt"})


def longer(old):
    """The same for more positions."""
    return {name: tensor if tensor.ndim < 4 else torch.ones(1, 1, 64, 64) for name, tensor in old.items()}


@pytest.mark.parametrize("kind", OLD)
@pytest.mark.parametrize(
    "where", [("base",), ("one",), ("base", "one"), ("one", "two"), ("base", "one", "two")], ids="+".join
)
def test_they_are_neither_refused_nor_merged(kind, where, tmp_path):
    pool = pico_pool(kind, tmp_path / "pool")
    places = {"base": pool["base"], **pool["experts"]}
    plain = set(load_file(Path(pool["base"]) / "model.safetensors"))
    for place in where:
        add(places[place], OLD[kind])
    vectors = TaskVectors(pool["base"], pool["experts"])
    assert set(vectors) - plain == (set(OLD[kind]) if len(where) == 3 else set()), "merged where all have them"
    merged = MergedModel(pool["backbone"](), vectors, LayerWise(vectors, init=0.3))
    export(Coefficients(vectors, merged.parametrization, merged.backbone.layout()), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == plain | (set(OLD[kind]) if "base" in where else set())
    assert all(torch.equal(written[name], OLD[kind][name]) for name in set(written) & set(OLD[kind]))
    model = {"task_vectors": {"base": str(pool["base"]), "experts": {k: str(v) for k, v in pool["experts"].items()}}}
    assert open_pool(model["task_vectors"], {}).problems == {}


@pytest.mark.parametrize("change", ["longer", "integers"])
def test_masks_of_another_length_or_kind(change, tmp_path):
    pool = pico_pool("gpt2", tmp_path)
    old = OLD["gpt2"] if change == "longer" else {"transformer.h.0.attn.bias": MASK.to(torch.uint8)}
    add(pool["base"], old)
    for folder in pool["experts"].values():
        add(folder, longer(old))
    vectors = TaskVectors(pool["base"], pool["experts"])
    assert "transformer.h.0.attn.bias" not in vectors
    MergedModel(pool["backbone"](), vectors, LayerWise(vectors))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("h.0.attn.bias", (48,)),
        ("h.0.attn.bias", (1, 4, 48, 48)),
        ("h.0.attn.bias", (1, 1, 48, 47)),
        ("inv_freq.weight", (4,)),
        ("rotary_emb.inv_freq", (4, 4)),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4)),
    ],
)
def test_parameters_of_like_names_are_none(name, shape):
    assert not is_leftover(name, shape)
    base, expert = StateDict({"w": torch.ones(1), name: torch.ones(shape)}), StateDict({"w": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=f"expert 'a' lacks '{name}'"):
        TaskVectors(base, {"a": expert})
    with pytest.raises(CheckpointError, match=f"expert 'a' has 1 tensors that the base lacks, first '{name}'"):
        TaskVectors(expert, {"a": base})


def test_the_first_files_of_t5_have_a_table_that_it_never_used():
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    base, expert = {"w": torch.ones(1), name: torch.ones(32, 4)}, {"w": torch.zeros(1)}
    assert list(TaskVectors(base, {"a": expert})) == ["w"] == list(TaskVectors(expert, {"a": base}))


def test_what_the_network_has_a_place_for_is_still_refused():
    class Rotated(ToyLanguage):
        def __init__(self) -> None:
            super().__init__()
            self.network.inv_freq = nn.Parameter(torch.ones(4))

    base = {name: tensor.detach().clone() for name, tensor in Rotated().network.named_parameters()}
    expert = {name: tensor + 1 for name, tensor in base.items() if name != "inv_freq"}
    vectors = TaskVectors(base, {"a": expert})
    with pytest.raises(CheckpointError, match="expert 'a' lacks 'inv_freq'"):
        MergedModel(Rotated(), vectors, LayerWise(vectors))
    MergedModel(ToyLanguage(), vectors, LayerWise(vectors))  # which has none


def test_what_is_left_out_is_told():
    base, old = StateDict({"w": torch.ones(1)}), {f"layers.{i}.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    expert = StateDict({"w": torch.zeros(1), **old})
    told = ["'layers.0.rotary_emb.inv_freq' and 2 more, saved by an older version on one side alone, is not merged"]
    assert leftovers(base, expert) == leftovers(expert, base) == told and leftovers(expert, expert) == []
