"""LoRA adapters: as whole models they are what peft merges; what they are not is refused with the reason."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from lora_models import CASES, tiny
from safetensors.torch import load_file, save_file

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.lora import CONFIG, WEIGHTS, AdapterCheckpoint
from adamerge.checkpoints.opening import open_checkpoint
from adamerge.errors import CheckpointError


def opened(lora, case: str) -> tuple[Checkpoint, AdapterCheckpoint]:
    base = open_checkpoint(lora.bases[CASES[case][0]])
    found = open_checkpoint(lora.adapters[case], base)
    assert isinstance(found, AdapterCheckpoint)
    return base, found


@pytest.fixture
def spoilt(lora, tmp_path):
    """A copy of an adapter with another configuration, or other tensors, opened on the base of its kind."""

    def make(case="llama", config=None, change=None):
        folder = tmp_path / "spoilt"
        shutil.copytree(lora.adapters[case], folder, dirs_exist_ok=True)
        if config is not None:
            old = json.loads((folder / CONFIG).read_text())
            (folder / CONFIG).write_text(json.dumps({**old, **config}))
        if change is not None:
            tensors = load_file(folder / WEIGHTS)
            change(tensors)
            save_file(tensors, folder / WEIGHTS)
        return open_checkpoint(folder, open_checkpoint(lora.bases[CASES[case][0]]))

    return make


@pytest.mark.parametrize("case", CASES)
def test_as_a_model_it_is_what_peft_merges(lora, case):
    base, adapter = opened(lora, case)
    merged = lora.merged[case]
    assert list(adapter) == list(base) and len(adapter) == len(base)
    changed = set()
    for name in base:
        assert adapter.shape(name) == merged[name].shape
        assert adapter.dtype(name) == adapter[name].dtype == torch.float32
        assert (adapter[name].double() - merged[name].double()).abs().max() <= 1e-6 * merged[name].abs().max(), name
        if not torch.equal(merged[name], base[name]):
            changed.add(name)
    assert changed == {name for name in base if (f := adapter.factors(name)) is None or f.rank > 0}
    assert len(changed) > 1


def test_the_copy_of_an_embedding_that_peft_saves_is_not_a_change(lora):
    _, adapter = opened(lora, "llama")
    assert "base_model.model.lm_head.base_layer.weight" in load_file(lora.adapters["llama"] / WEIGHTS)
    assert adapter.factors("lm_head.weight").rank == 4


@pytest.mark.parametrize("case", CASES)
def test_factors_are_the_difference_and_nothing_where_it_is_the_base(lora, case):
    base, adapter = opened(lora, case)
    low_rank = 0
    for name in base:
        factors = adapter.factors(name)
        if factors is None:
            assert name.startswith("classifier") or name.endswith(".bias")
            continue
        exact = lora.merged[case][name].double() - base[name].double()
        assert (factors.dense().view(exact.shape).double() - exact).abs().max() <= 1e-6
        assert factors.left().shape[1] == factors.right().shape[0] == factors.rank
        low_rank += factors.rank > 0
    assert low_rank > 0


def test_ranks_are_those_of_each_module(lora):
    _, adapter = opened(lora, "bert patterns")
    layers = "bert.encoder.layer"
    assert adapter.factors(f"{layers}.1.intermediate.dense.weight").rank == 5
    assert adapter.factors(f"{layers}.0.intermediate.dense.weight").rank == 3
    query = adapter.factors(f"{layers}.0.attention.self.query.weight")
    assert (query.rank, query.scale) == (2, pytest.approx(1 / 2**0.5))
    assert adapter.factors(f"{layers}.1.attention.self.value.weight").scale == pytest.approx(7 / 3**0.5)


def test_a_base_under_another_prefix_is_the_same_base(lora, tmp_path):
    plain = load_file(lora.bases["bert"] / "model.safetensors")
    _, known = opened(lora, "bert")
    trunk = {name.removeprefix("bert."): value for name, value in plain.items()}
    for prefix in ("", "model.encoder_of."):
        base = {name if name.startswith("classifier") else prefix + name: value for name, value in trunk.items()}
        found = open_checkpoint(lora.adapters["bert"], open_checkpoint(base))
        assert found.keys() == base.keys()
        for name in known:
            assert torch.equal(known[name], found[name if name.startswith("classifier") else prefix + name[5:]])
        assert found.fingerprint == known.fingerprint


def test_a_head_that_the_base_lacks_is_kept_under_its_own_name(lora):
    plain = load_file(lora.bases["bert"] / "model.safetensors")
    base = {name.removeprefix("bert."): value for name, value in plain.items() if not name.startswith("classifier")}
    adapter = open_checkpoint(lora.adapters["bert head"], open_checkpoint(base))
    assert set(adapter) - set(base) == {"classifier.weight", "classifier.bias"}
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(adapter[name], lora.merged["bert head"][name])


def test_a_whole_embedding_beside_its_factors_counts(spoilt, lora):
    """peft saves a resized or targeted embedding whole, as ``base_layer``; its factors come on top."""
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    whole = torch.randn(32, 16)

    def add(tensors):
        tensors[key] = whole
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(4, 32)
        tensors["base_model.model.model.embed_tokens.lora_embedding_B"] = torch.ones(16, 4)

    adapter = spoilt(change=add)
    assert adapter.factors("model.embed_tokens.weight") is None
    assert torch.allclose(adapter["model.embed_tokens.weight"], whole + 2 * 4)  # alpha / r = 8 / 4, four ones each


def test_a_convolutions_factors_are_those_of_peft(tmp_path):
    import peft

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 1))
    base = {name: value.detach().clone() for name, value in network.state_dict().items()}
    adapted = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path)
    merged = adapted.merge_and_unload().state_dict()
    adapter = open_checkpoint(tmp_path, open_checkpoint(base))
    for name in base:
        assert torch.allclose(adapter[name], merged[name], atol=1e-6), name
    assert not torch.equal(adapter["0.weight"], base["0.weight"])


def test_half_precision_factors_over_a_half_precision_base_are_added_in_fp32(lora, tmp_path):
    shutil.copytree(lora.adapters["llama"], tmp_path / "half")
    save_file({n: v.bfloat16() for n, v in load_file(tmp_path / "half" / WEIGHTS).items()}, tmp_path / "half" / WEIGHTS)
    base = {name: value.bfloat16() for name, value in tiny("llama").state_dict().items()}
    adapter = open_checkpoint(tmp_path / "half", open_checkpoint(base))
    name = "model.layers.0.self_attn.q_proj.weight"
    factors = {key: value.double() for key, value in load_file(tmp_path / "half" / WEIGHTS).items()}
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    exact = base[name].double() + 2 * factors[f"{stem}B.weight"] @ factors[f"{stem}A.weight"]
    assert adapter.dtype(name) == adapter[name].dtype == torch.float32
    assert (adapter[name].double() - exact).abs().max() < 1e-6
    assert adapter.dtype("model.norm.weight") == adapter["model.norm.weight"].dtype == torch.bfloat16


# fingerprints ---------------------------------------------------------------------------------------------------------


def test_fingerprint_is_that_of_factors_and_scales(lora, spoilt):
    _, adapter = opened(lora, "llama")
    assert spoilt().fingerprint == adapter.fingerprint
    assert spoilt(config={"lora_alpha": 9}).fingerprint != adapter.fingerprint
    assert spoilt(config={"use_rslora": True, "lora_alpha": 8}).fingerprint != adapter.fingerprint
    assert (
        spoilt(config={"task_type": "CAUSAL_LM", "lora_alpha": 8, "use_rslora": False}).fingerprint
        == adapter.fingerprint
    )

    def one_bit(tensors):
        next(iter(tensors.values()))[0, 0] += 1

    assert spoilt(change=one_bit).fingerprint != adapter.fingerprint
    assert adapter.fingerprint not in {checkpoint.fingerprint for checkpoint in (adapter.base, opened(lora, "bert")[1])}


def test_nan_in_a_factor_is_named(spoilt):
    def spoil(tensors):
        tensors["base_model.model.lm_head.lora_A.weight"][0, 0] = float("nan")

    with pytest.raises(CheckpointError, match=r"NaN or Inf.*lm_head\.lora_A"):
        spoilt(change=spoil).check()
    spoilt().check()


def test_the_name_of_its_base_is_recorded_and_decides_nothing(spoilt):
    assert spoilt(config={"base_model_name_or_path": "org/other"}).base_name == "org/other"


# what it is not ---------------------------------------------------------------------------------------------------------

VARIANTS = {
    "use_dora": True, "lora_bias": True, "use_qalora": True, "target_parameters": ["experts.gate"],
    "layer_replication": [[0, 2]], "trainable_token_indices": [1], "alora_invocation_tokens": [1],
    "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 1}, "kasa_config": {"a": 1}, "monteclora_config": {"a": 1},
    "peft_type": "LOHA", "init_lora_weights": "pissa_niter_4",
}  # fmt: skip


@pytest.mark.parametrize("key", VARIANTS)
def test_other_kinds_of_adapters_are_refused_with_the_reason(spoilt, key):
    with pytest.raises(CheckpointError, match="adapter_config.json") as caught:
        spoilt(config={key: VARIANTS[key]})
    assert "peft" in caught.value.todo and len(caught.value.what) > 60


@pytest.mark.parametrize("start", ["loftq", "olora", "PiSSA", "corda", "lora_ga"])
def test_an_initialisation_that_changes_the_base_is_refused(spoilt, start):
    with pytest.raises(CheckpointError, match="changed the base's weights"):
        spoilt(config={"init_lora_weights": start})
    spoilt(config={"init_lora_weights": "gaussian"})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"r": 0}, "r or rank_pattern"),
        ({"r": None}, "r or rank_pattern"),
        ({"r": 3}, "do not have the rank"),
        ({"lora_alpha": "eight"}, "lora_alpha or alpha_pattern"),
        ({"lora_alpha": float("nan")}, "lora_alpha or alpha_pattern"),
        ({"rank_pattern": {"q_proj": True}}, "r or rank_pattern"),
        ({"rank_pattern": ["q_proj"]}, "r or rank_pattern"),
        ({"alpha_pattern": {"q_proj(": 3}}, "no pattern"),
        ({"rank_pattern": {"q_proj": 3}}, "do not have the rank"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(spoilt, config, says):
    with pytest.raises(CheckpointError, match=says):
        spoilt(config=config)


def again(tensors, module):
    """The factors of STEM once more, under another name."""
    tensors.update({f"{module}.lora_{x}.weight": tensors[f"{STEM}.lora_{x}.weight"].clone() for x in "AB"})


STEM = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{STEM}.lora_B.weight"), "one factor of 'model.layers.0.self_attn.q_proj' only"),
        (lambda t: t.update({f"{STEM}.lora_magnitude_vector": torch.ones(16)}), "lora_magnitude_vector.*no factor of plain"),
        (lambda t: t.update({"model.q.lora_A.weight": torch.ones(4, 4)}), "unexpected key 'model.q.lora_A.weight'"),
        (lambda t: t.update({f"{STEM}.lora_B.weight": torch.ones(15, 4)}), "does not belong to this base"),
        (lambda t: t.update({f"{STEM}.lora_B.weight": torch.ones(16, 3)}), "does not belong to this base"),
        (lambda t: t.update({f"{STEM}.lora_B.weight": torch.ones(4)}), "does not belong to this base"),
        (lambda t: again(t, f"{STEM}.base_layer"), "a factor of .* twice"),
        (lambda t: again(t, "base_model.model.model.layers.7.q"),
         r"'model\.layers\.7\.q\.weight' is no tensor of the base"),
    ],
    ids=["one factor", "magnitude", "prefix", "rows", "rank", "vector", "twice", "unknown module"],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_by_name(spoilt, change, says):
    with pytest.raises(CheckpointError, match=says):
        spoilt(change=change)


def test_an_adapter_of_a_larger_base_is_refused_by_shape(lora):
    base = {name: torch.cat([value, value], dim=-1) for name, value in tiny("llama").state_dict().items()}
    with pytest.raises(CheckpointError, match="does not belong to this base: the factors of"):
        open_checkpoint(lora.adapters["llama"], open_checkpoint(base))


def test_square_factors_are_turned_as_the_flag_says_and_refused_where_it_is_contradicted(lora, spoilt):
    base, adapter = opened(lora, "gpt2 square")
    name = "transformer.h.0.attn.c_proj.weight"
    turned = spoilt("gpt2 square", config={"fan_in_fan_out": False})
    mine, other = adapter[name] - base[name], turned[name] - base[name]
    assert torch.allclose(mine, other.t(), atol=1e-6) and not torch.allclose(mine, other, atol=1e-3)
    # c_attn (16, 48) shows which way it is stored; the square c_proj cannot, and the flag says otherwise
    with pytest.raises(CheckpointError, match=r"which way round the factors of '.*attn\.c_proj\.weight'"):
        spoilt("gpt2", config={"fan_in_fan_out": False})


def test_a_pickled_adapter_is_refused_and_not_run(lora, tmp_path):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return Path.mkdir, (canary,)

    folder = tmp_path / "pickled"
    shutil.copytree(lora.adapters["llama"], folder)
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="only as pickle"):
        open_checkpoint(folder, open_checkpoint(lora.bases["llama"]))
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors'?: no such file"):
        open_checkpoint(folder, open_checkpoint(lora.bases["llama"]))
    (folder / CONFIG).write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        open_checkpoint(folder, open_checkpoint(lora.bases["llama"]))
    assert not canary.exists()
