"""Parity of export: every transformers backbone, merged, exported, and loaded again by a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pico import KINDS, TASKS, VISION_LANGUAGE, pico_pool
from running import environment
from safetensors.torch import load_file

from adamerge import LayerWise, MergedModel, TaskVectors
from adamerge.artifacts.coefficients import Coefficients, load_coefficients, save_coefficients
from adamerge.artifacts.export import export
from adamerge.backbones.inputs import packed, stack

NARROW = ["gpt2", "roberta", *VISION_LANGUAGE]
CASES = [*((kind, "float32") for kind in [*KINDS, "qwen2_vl_tied"]), *((kind, "bfloat16") for kind in NARROW)]
TIED_OF_IMAGES = {"llava": 0, "qwen2_vl": 0, "qwen2_vl_tied": 2, "internvl": 2}


def asked(kind, dtype, folder):
    """Merge, export, and note the trainer's own logits."""
    pool = pico_pool(kind, folder / "pool")
    backbone = pool["backbone"](dtype)
    vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"], exclude=pool["exclude"])
    merged = MergedModel(backbone, vectors, LayerWise(vectors, init=0.3))
    with torch.no_grad():
        for i, parameter in enumerate(merged.parametrization.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    backbone.build_heads(TASKS, vectors.checkpoints)
    file = folder / "coefficients.safetensors"
    made = Coefficients(vectors, merged.parametrization, backbone.layout(), dtype=merged.dtype, step=3)
    save_coefficients(made, file)
    task = "two" if backbone.layout().heads else None
    export(load_coefficients(file), folder / "model", task=task)
    inputs = stack([backbone.preprocess(sample) for sample in pool["samples"]["two"]])
    with torch.no_grad():
        merged.merge()
        output = backbone.output(merged(inputs), "two")
    if isinstance(inputs, torch.Tensor):
        given = {"pixel_values": backbone.images.normalise(inputs).to(merged.dtype)}
    else:
        given = {name: packed(inputs)[name] for name in pool["inputs"]}
        padding = getattr(backbone.network.config, "pad_token_id", None)
        if kind in {"bert", "bert_mlm", "roberta", "sentence"} and padding:
            given["input_ids"] = given["input_ids"].masked_fill(given["attention_mask"] == 0, padding)
    head = getattr(backbone.heads.get("two"), "weight", None)
    torch.save({"inputs": given, "loader": pool["loader"], "head": head}, folder / "question.pt")
    buffers = {name: value for name, value in backbone.network.named_buffers() if "running" in name}
    return {"pool": pool, "logits": output.logits, "buffers": buffers, "layout": backbone.layout(), "task": task}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    root = tmp_path_factory.mktemp("parity")
    found = {(kind, dtype): asked(kind, dtype, root / f"{kind}-{dtype}") for kind, dtype in CASES}
    run = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("parity.py")), str(root)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    for (kind, dtype), case in found.items():
        case["folder"] = root / f"{kind}-{dtype}"
        case["answer"] = torch.load(case["folder"] / "answer.pt")
    return found


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_a_stranger_computes_what_the_trainer_computed(answers, kind, dtype):
    case = answers[kind, dtype]
    answer, logits = case["answer"], case["logits"].float()
    assert answer["problems"] == {}
    assert answer["dtype"] == f"torch.{dtype}"
    difference = float((answer["logits"].float() - logits).abs().max())
    assert difference <= 1e-5 * max(1.0, float(logits.abs().max()))
    assert answer["buffers"].keys() == case["buffers"].keys()
    assert all(torch.equal(answer["buffers"][name], value) for name, value in case["buffers"].items())


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_names_on_disk_are_the_bases(answers, kind, dtype):
    case = answers[kind, dtype]
    written = load_file(case["folder"] / "model" / "model.safetensors")
    like = load_file(
        Path(case["pool"]["experts"]["two"] if case["task"] else case["pool"]["base"]) / "model.safetensors"
    )
    assert written.keys() == like.keys()
    assert all(value.dtype == getattr(torch, dtype) for value in written.values() if value.is_floating_point())
    assert {name: value.shape for name, value in written.items()} == {n: v.shape for n, v in like.items()}


def test_ties_are_still_tied(answers):
    for kind, count in {"gpt2": 2, "qwen2_tied": 2, "t5": 4, "qwen2": 0, "t5_untied": 3, **TIED_OF_IMAGES}.items():
        ties = answers[kind, "float32"]["answer"]["ties"]
        assert sum(map(len, ties)) == count, (kind, ties)
