"""Origins: an exported folder names models as others know them, and holds no path of the machine that made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from lora_models import save_adapter, save_base
from running import command
from safetensors.torch import save_file

from adamerge.artifacts.coefficients import Coefficients, load_coefficients, save_coefficients
from adamerge.artifacts.export import export
from adamerge.artifacts.lora_export import export_adapter
from adamerge.artifacts.model_card import COEFFICIENTS_FILE
from adamerge.checkpoints.opening import open_checkpoint
from adamerge.checkpoints.origins import base_name, is_path, origin, shown
from adamerge.io.model_folder import Layout
from adamerge.parametrizations import LayerWise
from adamerge.task_vectors.task_vectors import TaskVectors


def model_at(folder: Path, config: object = None) -> Path:
    folder.mkdir(parents=True)
    save_file({"w": torch.ones(2)}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_a_model_is_called(tmp_path, monkeypatch):
    plain = open_checkpoint(model_at(tmp_path / "deep" / "experts" / "cars"))
    assert (origin(plain), shown(plain)) == ("local:cars", "cars")
    cached = model_at(tmp_path / "hub" / "models--org--na-me.v2" / "snapshots" / "0af3", {"_name_or_path": "x/y"})
    assert origin(open_checkpoint(cached)) == "org/na-me.v2@0af3"
    assert base_name(open_checkpoint(cached), []) == "org/na-me.v2"
    monkeypatch.setattr("adamerge.checkpoints.opening._download", lambda source: cached)
    fetched = open_checkpoint("org/model@main")
    assert origin(fetched) == "org/model@main" and base_name(fetched, []) == "org/model"
    images = open_checkpoint("package:adamerge/testbed/checkpoints/images/base")
    assert origin(images) == "package:adamerge/testbed/checkpoints/images/base" and base_name(images, []) is None
    assert origin(open_checkpoint({"w": torch.ones(2)})) == "local:the state dict in memory"


@pytest.mark.parametrize(
    ("called", "known"),
    [
        ("org/model", "org/model"), ("/home/me/model", None), ("~/model", None), ("./org/model", None), ("../model", None),
        ("C:/models/x", None), ("C:\\models\\x", None), ("", None), (None, None), (3, None), ("here/model", None),
    ],
)  # fmt: skip
def test_the_configurations_name_counts_where_it_is_no_path(tmp_path, monkeypatch, called, known):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert base_name(open_checkpoint(model_at(tmp_path / "base", {"_name_or_path": called})), []) == known
    assert is_path(called) == (known is None and bool(called) and isinstance(called, str))


@pytest.fixture
def merged(tmp_path):
    """A merge of two adapters whose folders all over say where they are."""
    home = tmp_path / "home-of-somebody"
    base = Path(save_base("llama", home / "base"))
    config = json.loads((base / "config.json").read_text()) | {"_name_or_path": str(base), "dtype": "float32"}
    (base / "config.json").write_text(json.dumps(config))
    tokenizer = {"name_or_path": str(base), "tokenizer_file": str(base / "t.json"), "model_max_length": 48, "pad": "/s"}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    for task in ("one", "two"):
        save_adapter("llama", home / task, target_modules=["q_proj", "v_proj"])
        config = json.loads((home / task / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
        (home / task / "adapter_config.json").write_text(json.dumps(config))
    vectors = TaskVectors(base, {task: home / task for task in ("one", "two")})
    return Coefficients(vectors, LayerWise(vectors, init=0.3), Layout(copied=["config.json", "tokenizer_config.json"]))


def machine_paths(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and b"home-of-somebody" in path.read_bytes()]


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---")[1])


def test_nothing_in_an_exported_folder_says_where_it_was_made(merged, tmp_path, capfd):
    out = export(merged, tmp_path / "dense")
    adapter = export_adapter(merged, tmp_path / "adapter")
    assert machine_paths(out) == machine_paths(adapter) == []
    assert front_matter(out).keys() == front_matter(adapter).keys() == {"tags"}
    card = (out / "README.md").read_text()
    assert f"`base` (sha256 `{merged.task_vectors.base.fingerprint[:16]}`)" in card and "- `one`: `one` (sha256" in card
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    config = json.loads((out / "config.json").read_text())
    assert "_name_or_path" not in config and config["model_type"] == "llama"
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"model_max_length": 48, "pad": "/s"}
    # a run's own file says where its models are, and the exported one only what they were called
    save_coefficients(merged, tmp_path / "coefficients.safetensors")
    assert load_coefficients(tmp_path / "coefficients.safetensors").step == 0
    base, home = merged.task_vectors.base.location, tmp_path / "home-of-somebody"
    words = ["export", out / COEFFICIENTS_FILE, tmp_path / "again"]
    assert "where the base is" in command(capfd, *words).error
    words += ["--base", base]
    outcome = command(capfd, *words)
    assert "where expert 'one' is" in outcome.error and "--expert one=PATH" in outcome.err and outcome.code == 3
    words += ["--expert", f"one={home / 'one'}", "--expert", f"two={home / 'two'}"]
    assert command(capfd, *words).code == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    shown = command(capfd, "inspect", out)
    assert "merged by adamerge: adamerge inspect " in shown.out and "coefficients.safetensors" in shown.out
    assert command(capfd, "inspect", out / COEFFICIENTS_FILE).code == 0


def test_the_hub_id_is_named_where_the_adapters_know_it(merged, tmp_path):
    for expert in merged.task_vectors.checkpoints.values():
        expert.base_name = "org/base"
    for folder in (export(merged, tmp_path / "dense"), export_adapter(merged, tmp_path / "adapter")):
        assert front_matter(folder)["base_model"] == ["org/base"]
        assert front_matter(folder)["base_model_relation"] == "merge"
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    )
