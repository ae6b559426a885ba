"""Links: what leads out of a model's folder is neither copied nor handed to a library; weights and the Hub cache may."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from lora_models import save_adapter, save_base

from adamerge.artifacts.coefficients import Coefficients
from adamerge.artifacts.export import export
from adamerge.backbones import OpenClipClassifier, SequenceClassifier
from adamerge.errors import CheckpointError
from adamerge.io.links import refuse_links_outside, refuse_outside
from adamerge.io.model_folder import Layout
from adamerge.parametrizations import TaskWise
from adamerge.task_vectors.task_vectors import TaskVectors


def test_where_a_link_may_lead(tmp_path):
    folder, other = tmp_path / "model", tmp_path / "other"
    for place in (folder, folder / "sub", other):
        place.mkdir()
    for name in ("plain.json", "sub/deep.json"):
        (folder / name).write_text("{}")
    (other / "secret.json").write_text("{}")
    (folder / "near.json").symlink_to("plain.json")
    (folder / "deep.json").symlink_to("sub/deep.json")
    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / name).symlink_to(other / "secret.json")
    (folder / "dataset").symlink_to(other)  # a folder, which no library reads
    refuse_links_outside(folder)
    (tmp_path / "alias").symlink_to(folder)
    refuse_links_outside(tmp_path / "alias")
    for target in (other / "secret.json", Path("../other/secret.json"), tmp_path / "gone", "/etc/hostname"):
        (folder / "far.json").symlink_to(target)
        with pytest.raises(CheckpointError, match=r"far\.json' is a link that leads out of its folder"):
            refuse_links_outside(folder)
        (folder / "far.json").unlink()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").symlink_to(other / "secret.json")
    with pytest.raises(CheckpointError, match=r"tools\.jinja' is a link"):
        refuse_links_outside(folder)
    shutil.rmtree(folder / "additional_chat_templates")
    (folder / "additional_chat_templates").symlink_to(other)
    with pytest.raises(CheckpointError, match="additional_chat_templates' is a link"):
        refuse_links_outside(folder)
    (folder / "additional_chat_templates").unlink()
    (folder / "one.json").symlink_to("two.json")  # by way of another
    (folder / "two.json").symlink_to(other / "secret.json")
    with pytest.raises(CheckpointError, match="leads out"):
        refuse_outside(folder / "one.json")


def test_the_hub_caches_own_links_are_good_and_no_others(tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (repository / "blobs" / "1234").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    refuse_links_outside(snapshot)
    (tmp_path / "secret").write_text("{}")
    (repository / "blobs" / "5678").symlink_to(tmp_path / "secret")
    for target in ("../../blobs/5678", "../../../secret", "../../refs/main"):
        (snapshot / "tokenizer.json").symlink_to(target)
        with pytest.raises(CheckpointError, match="tokenizer.json' is a link"):
            refuse_links_outside(snapshot)
        (snapshot / "tokenizer.json").unlink()


def test_no_network_is_built_from_a_file_outside(pool, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(pool["base"], folder)
    (folder / "open_clip_config.json").rename(tmp_path / "elsewhere.json")
    (folder / "open_clip_config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="open_clip_config.json' is a link"):
        OpenClipClassifier(str(folder))
    bert = Path(save_base("bert", tmp_path / "bert"))
    (bert / "tokenizer_config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="tokenizer_config.json' is a link"):
        SequenceClassifier(str(bert))


def test_no_export_copies_a_file_from_outside(tmp_path):
    """Neither of the base, nor of an expert whose head stands aside; weights may be anywhere."""
    base = Path(save_base("bert", tmp_path / "base"))
    save_adapter("bert", tmp_path / "one", **{"target_modules": ["query"], "modules_to_save": ["classifier"]})
    (tmp_path / "secret.json").write_text(json.dumps({"password": "canary"}))
    (base / "notes.json").symlink_to(tmp_path / "secret.json")
    (base / "model.safetensors").rename(tmp_path / "weights.safetensors")
    (base / "model.safetensors").symlink_to(tmp_path / "weights.safetensors")

    def exported(layout, name):
        vectors = TaskVectors(base, {"one": tmp_path / "one"}, exclude=["classifier.*"])
        return export(Coefficients(vectors, TaskWise(vectors), layout), tmp_path / name)

    with pytest.raises(CheckpointError, match="notes.json' is a link that leads out"):
        exported(Layout(copied=["config.json", "notes.json"]), "first")
    assert not (tmp_path / "first").exists()
    good = exported(Layout(copied=["config.json"], heads=["classifier.*"]), "second")
    assert (good / "config.json").is_file() and not (good / "config.json").is_symlink()
    assert not (good / "model.safetensors").is_symlink()
    (tmp_path / "one" / "config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match="config.json' is a link that leads out"):
        exported(Layout(copied=["config.json"], heads=["classifier.*"]), "third")
    assert "canary" not in "".join(path.read_text(errors="ignore") for path in good.rglob("*") if path.is_file())
