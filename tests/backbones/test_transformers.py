"""What all transformers backbones share: refusals on loading, hidden states by number, files that are taken over."""

import json
from pathlib import Path

import pytest
import torch
from pico import KINDS, pico_pool
from safetensors.torch import load_file, save_file

from adamerge.backbones import CausalLM
from adamerge.backbones.transformers import chosen, outlined
from adamerge.errors import CheckpointError, ConfigError
from adamerge.merging.merged_model import MergedModel
from adamerge.parametrizations import LayerWise
from adamerge.task_vectors.task_vectors import TaskVectors


@pytest.fixture
def folder(tmp_path):
    return Path(pico_pool("llama", tmp_path)["base"])


def changed(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("model.norm.weight"), "lacks 'model.norm.weight'"),
        (lambda w: w.update(extra=torch.zeros(2)), "has unexpected 'extra'"),
        (lambda w: w.update({"model.norm.weight": torch.zeros(3)}), "cannot load it"),
    ],
)
def test_weights_that_are_not_the_networks_are_refused(folder, change, words):
    changed(folder, change)
    with pytest.raises(CheckpointError, match=words):
        CausalLM(str(folder))


def test_folders_that_transformers_cannot_load_are_checkpoint_errors(folder):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        CausalLM(str(folder / "nowhere"))
    with pytest.raises(CheckpointError, match="is a file"):
        CausalLM(str(folder / "model.safetensors"))
    with pytest.raises(ConfigError, match="no dtype 'int8'"):
        CausalLM(str(folder), dtype="int8")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonsense"}))
    with pytest.raises(CheckpointError, match="AutoModelForCausalLM cannot load it"):
        CausalLM(str(folder))


@pytest.mark.parametrize("kind", [*KINDS, "qwen2_vl_tied"])
def test_what_never_runs_needs_no_weights(kind, tmp_path):
    """An outline has the names, shapes and layout of the network, and a merged model of it holds coefficients alone."""
    pool = pico_pool(kind, tmp_path)
    whole = pool["backbone"]()
    with outlined():
        outline = pool["backbone"]()
    assert pool["backbone"]().outlined is whole.outlined is False and outline.outlined
    assert all(parameter.is_meta for parameter in outline.network.parameters())
    made = []
    for backbone in (whole, outline):
        vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"], exclude=pool["exclude"])
        merged = MergedModel(backbone, vectors, LayerWise(vectors, init=0.3))
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in backbone.tensors().items()}
        made.append((shapes, backbone.layout(), merged.dtype, list(merged.parametrization.values())))
    assert made[0] == made[1]


def test_no_code_of_a_folder_is_run(folder):
    config = json.loads((folder / "config.json").read_text())
    code = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config | code))
    (folder / "evil.py").write_text(f"open({str(folder / 'canary')!r}, 'w')\n")
    with pytest.raises(CheckpointError):
        CausalLM(str(folder))
    assert not (folder / "canary").exists()


def test_files_that_describe_the_model_are_taken_over_and_weights_are_not(folder):
    for name in ("README.md", "training_args.bin", "model.safetensors.index.json.old", "tokenizer.model", "my_code.py"):
        (folder / name).write_text("x")
    assert CausalLM(str(folder)).layout().copied == (
        *("chat_template.jinja", "config.json", "generation_config.json", "my_code.py"),
        *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    )


def test_hidden_states_by_number():
    states = [torch.full((1, 2, 3), float(i)) for i in range(3)]
    assert [float(state[0, 0, 0]) for state in chosen(states, [0, 2, -1, -3])] == [0, 2, 2, 0]
    maps = torch.arange(8.0).view(1, 2, 2, 2)
    assert chosen([maps], [0])[0].tolist() == [[[0, 4], [1, 5], [2, 6], [3, 7]]]
    assert chosen(None, []) == ()
    with pytest.raises(ConfigError, match="no hidden state 3"):
        chosen(states, [3])
    with pytest.raises(ConfigError, match="gives no hidden states"):
        chosen(None, [0])
