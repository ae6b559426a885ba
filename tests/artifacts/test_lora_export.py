"""Export as one adapter: peft reloads it in a process of its own with the merged model's logits; else it is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from lora_models import tiny
from safetensors.torch import load_file, save_file

from adamerge.artifacts.coefficients import Coefficients, save_coefficients
from adamerge.artifacts.export import merged_tensors
from adamerge.artifacts.lora_export import export_adapter
from adamerge.checkpoints.lora import CONFIG, WEIGHTS
from adamerge.checkpoints.opening import open_checkpoint
from adamerge.cli import main
from adamerge.errors import ExportError
from adamerge.parametrizations import ChunkWise, ImportanceChunkWise, LayerWise, RandomPartition, TaskWise
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import Combine, Scale, Ties

POOLS = {
    "bert": ["bert", "bert rslora", "bert patterns", "bert embedding"],
    "gpt2": ["gpt2", "gpt2 square"],
    "llama": ["llama", "llama patterns"],
}
CLASSES = {
    "bert": "AutoModelForSequenceClassification",
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
}


def merge_of(lora, kind, factory=LayerWise, transforms=(), cases=None, **arguments) -> Coefficients:
    vectors = TaskVectors(lora.bases[kind], {c: lora.adapters[c] for c in cases or POOLS[kind]}, transforms)
    parametrization = factory(vectors, **arguments)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        parametrization.w.copy_(torch.rand(parametrization.w.shape, generator=generator) - 0.3)
    return Coefficients(vectors, parametrization)


CHILD = """
    import sys, torch, warnings
    warnings.simplefilter("error", UserWarning)
    import peft, transformers
    folder, base, kind, expected = sys.argv[1:]
    assert "adamerge" not in sys.modules
    network = getattr(transformers, kind).from_pretrained(base).eval()
    adapted = peft.PeftModel.from_pretrained(network, folder).eval()
    want = torch.load(expected, weights_only=True)
    with torch.no_grad():
        logits = adapted(want["ids"]).logits
        merged = adapted.merge_and_unload()(want["ids"]).logits
    for found in (logits, merged):
        worst = float((found - want["logits"]).abs().max())
        assert worst <= 1e-5 * max(1.0, float(want["logits"].abs().max())), worst
    assert float((want["logits"] - want["base"]).abs().max()) > 1e-2
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_peft_reloads_it_with_the_merged_models_logits(lora, tmp_path, kind):
    coefficients = merge_of(lora, kind)
    export_adapter(coefficients, tmp_path / "out")
    network = tiny(kind)
    ids = torch.randint(0, 32, (3, 7), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        plain = network(ids).logits
        network.load_state_dict(dict(merged_tensors(coefficients, torch.float32)), strict=False)
        torch.save({"ids": ids, "logits": network(ids).logits, "base": plain}, tmp_path / "expected.pt")
    given = [tmp_path / "out", lora.bases[kind], CLASSES[kind], tmp_path / "expected.pt"]
    command = [sys.executable, "-c", textwrap.dedent(CHILD), *map(str, given)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("kind", POOLS)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_its_change_is_the_merge_and_its_ranks_are_sums(lora, tmp_path, kind, scaled):
    coefficients = merge_of(lora, kind, transforms=[Scale({kind: -1.5})] if scaled else [])
    export_adapter(coefficients, tmp_path / "out")
    vectors = coefficients.task_vectors
    again = open_checkpoint(tmp_path / "out", vectors.base)
    merged = dict(merged_tensors(coefficients, torch.float32))
    for name in vectors.base:
        assert (again[name] - merged[name]).abs().max() <= 1e-6 * max(1.0, float(merged[name].abs().max())), name
        ranks = [checkpoint.factors(name).rank for checkpoint in vectors.checkpoints.values()]
        assert again.factors(name).rank == sum(ranks)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] and config["rank_pattern"] == config["alpha_pattern"]
    assert {value.dtype for value in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.float32}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted([CONFIG, WEIGHTS, "README.md", "adamerge"])


def test_the_adapter_is_an_expert_again(lora, tmp_path):
    coefficients = merge_of(lora, "llama", TaskWise)
    export_adapter(coefficients, tmp_path / "out")
    again = TaskVectors(lora.bases["llama"], {"merged": tmp_path / "out"})
    for name in again:
        update = coefficients.parametrization(name, coefficients.task_vectors[name])
        assert torch.allclose(again[name].dense()[0], update, atol=1e-6)


def test_sums_of_experts_and_frozen_tensors_are_factors_too(lora, tmp_path):
    sums = Combine({"new": {"llama": -1.0, "llama patterns": 2.0}})
    vectors = merge_of(lora, "llama", transforms=[sums]).task_vectors
    allocation = {name: int(i > 0) for i, name in enumerate(vectors)}
    coefficients = merge_of(lora, "llama", ImportanceChunkWise, [sums], allocation=allocation)
    export_adapter(coefficients, tmp_path / "out")
    again = open_checkpoint(tmp_path / "out", vectors.base)
    for name, tensor in merged_tensors(coefficients, torch.float32):
        assert torch.allclose(again[name], tensor, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"factory": ChunkWise}, "several coefficients per expert"),
        ({"factory": RandomPartition}, "several coefficients per expert"),
        ({"transforms": [Ties()]}, "not low-rank in every expert"),
        ({"kind": "bert", "cases": ["bert", "bert head"]}, "not low-rank in every expert"),
    ],
    ids=["chunks", "partition", "ties", "whole tensors"],
)
def test_what_is_no_sum_of_factors_is_refused_with_the_reason(lora, tmp_path, arguments, says):
    coefficients = merge_of(lora, **{"kind": "llama", **arguments})
    with pytest.raises(ExportError, match=f"cannot be written as one adapter: .*{says}"):
        export_adapter(coefficients, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_recomputed_buffers_are_refused(lora, tmp_path):
    made = merge_of(lora, "llama")
    name = next(name for name in made.task_vectors.base if name not in made.task_vectors)
    with pytest.raises(ExportError, match=f"buffers such as '{name}' were recomputed"):
        export_adapter(replace(made, buffers={name: made.task_vectors.base[name]}), tmp_path / "out")


def test_full_models_are_refused(lora, tmp_path):
    full = {name: value + 1 for name, value in load_file(lora.bases["llama"] / "model.safetensors").items()}
    vectors = TaskVectors(lora.bases["llama"], {"low": lora.adapters["llama"], "full": full})
    with pytest.raises(ExportError, match="expert 'full' is a full model"):
        export_adapter(Coefficients(vectors, LayerWise(vectors)), tmp_path / "out")


def test_two_names_of_one_tensor_are_refused(lora, tmp_path):
    """One adapter of the trunk alone, one of the classifier around it: no network has both names."""
    (tmp_path / "trunk").mkdir()
    tensors = {n.replace("model.bert.", "model."): v for n, v in load_file(lora.adapters["bert"] / WEIGHTS).items()}
    save_file({n: v + 1 for n, v in tensors.items()}, tmp_path / "trunk" / WEIGHTS)
    (tmp_path / "trunk" / CONFIG).write_bytes((lora.adapters["bert"] / CONFIG).read_bytes())
    vectors = TaskVectors(lora.bases["bert"], {"one": lora.adapters["bert"], "two": tmp_path / "trunk"})
    with pytest.raises(ExportError, match="several names"):
        export_adapter(Coefficients(vectors, LayerWise(vectors)), tmp_path / "out")


def test_an_existing_folder_stays_until_it_is_replaced(lora, tmp_path):
    coefficients = merge_of(lora, "llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(ExportError, match="exists"):
        export_adapter(coefficients, tmp_path / "out")
    assert (tmp_path / "out" / "old").exists()
    export_adapter(coefficients, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "old").exists() and [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ExportError, match="input"):
        export_adapter(coefficients, lora.adapters["llama"], overwrite=True)


def test_on_the_command_line(lora, tmp_path, capsys):
    file = tmp_path / "coefficients.safetensors"
    save_coefficients(merge_of(lora, "llama"), file)
    assert main(["export", str(file), str(tmp_path / "adapter"), "--adapter"]) == 0
    assert (tmp_path / "adapter" / WEIGHTS).is_file() and "exported: " in capsys.readouterr().out
    assert main(["export", str(file), str(tmp_path / "dense")]) == 0
    assert (tmp_path / "dense" / "model.safetensors").is_file()
    for words in (["--adapter", "--dtype", "float16"], ["--adapter", "--shard-size", "1"], ["--dtype", "float64"]):
        assert main(["export", str(file), str(tmp_path / "other"), *words]) == 2
        assert f"error: {words[0]}" in capsys.readouterr().err and not (tmp_path / "other").exists()
