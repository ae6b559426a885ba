"""Heads that are each expert's own: found, read, and refused when they do not fit."""

import shutil

import pytest
import torch
import transformers
from pico import TASKS, pico_pool, random_model, tokenizer
from safetensors.torch import load_file, save_file

from adamerge.artifacts.coefficients import Coefficients
from adamerge.artifacts.export import export
from adamerge.backbones import SequenceClassifier
from adamerge.checkpoints.opening import open_checkpoint
from adamerge.errors import CheckpointError
from adamerge.merging.merged_model import MergedModel
from adamerge.parametrizations import LayerWise
from adamerge.task_vectors.task_vectors import TaskVectors


@pytest.fixture
def pool(tmp_path):
    return pico_pool("bert_mlm", tmp_path)


def test_a_head_is_what_the_base_lacks(pool):
    backbone = pool["backbone"]()
    assert backbone.head_modules == ("bert.pooler", "classifier")
    layout = backbone.layout()
    assert layout.is_head("bert.pooler.dense.weight") and layout.is_head("classifier.bias")
    assert layout.is_head("cls.predictions.bias") and not layout.is_head("bert.embeddings.LayerNorm.weight")
    assert backbone.ignores("cls.predictions.bias")
    assert all(name.startswith("bert.") for name in backbone.tensors())


def test_a_base_with_a_head_of_its_own_keeps_it_out(tmp_path):
    backbone = pico_pool("bert", tmp_path)["backbone"]()
    assert backbone.head_modules == ("classifier",)
    assert backbone.ignores("classifier.weight") and not backbone.trains("classifier.weight")
    assert "bert.pooler.dense.weight" in backbone.tensors()


@pytest.mark.parametrize("in_memory", [True, False])
def test_heads_are_the_experts_values(pool, in_memory):
    backbone = pool["backbone"]()
    places = {task: f"{place}/model.safetensors" for task, place in pool["experts"].items()}
    experts = {task: open_checkpoint(load_file(p) if in_memory else p) for task, p in places.items()}
    backbone.build_heads(TASKS, experts)
    for task, classes in (("one", 3), ("two", 4)):
        values = load_file(places[task])
        features = torch.randn(2, 5, 16)
        pooled = torch.tanh(features[:, 0] @ values["bert.pooler.dense.weight"].T + values["bert.pooler.dense.bias"])
        expected = pooled @ values["classifier.weight"].T + values["classifier.bias"]
        assert expected.shape == (2, classes)
        assert torch.allclose(backbone.heads[task](features), expected, atol=1e-6)


def test_missing_heads_are_refused_by_name(pool):
    backbone = pool["backbone"]()
    file = f"{pool['experts']['one']}/model.safetensors"
    experts = {task: open_checkpoint(place) for task, place in pool["experts"].items()}
    with pytest.raises(CheckpointError, match="task 'two' has no expert"):
        backbone.build_heads(TASKS, {"one": experts["one"]})
    values = load_file(file)
    for change in ({"classifier.bias": torch.zeros(9)}, {"classifier.bias": None}):
        changed = {name: value for name, value in (values | change).items() if value is not None}
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match="expert 'one' has no head that fits"):
            backbone.build_heads(TASKS, experts | {"one": open_checkpoint(pool["experts"]["one"])})


def test_a_head_that_does_more_than_its_modules_is_refused(tmp_path):
    """DistilBERT has a function between two layers of its head, which no module of it shows."""
    config = transformers.DistilBertConfig(vocab_size=64, dim=16, hidden_dim=24, n_layers=1, n_heads=2, num_labels=3)
    random_model(transformers.AutoModelForSequenceClassification, config, 0).save_pretrained(tmp_path)
    tokenizer(tmp_path, marked=True)
    with pytest.raises(CheckpointError, match="does more behind its trunk"):
        SequenceClassifier(str(tmp_path), max_length=16)


@pytest.mark.parametrize("kind", ["vit", "bert", "resnet"])
def test_experts_of_a_base_that_was_saved_as_the_bare_model(kind, tmp_path):
    """Such as vit-base-patch16-224-in21k: the same weights, heads and exported models as of a base with the prefix."""
    pool = pico_pool(kind, tmp_path)
    network = getattr(transformers, pool["loader"]).from_pretrained(pool["base"])
    shutil.copytree(pool["base"], tmp_path / "bare")
    getattr(network, network.base_model_prefix).save_pretrained(tmp_path / "bare")
    prefix = f"{network.base_model_prefix}."
    assert not any(name.startswith(prefix) for name in load_file(tmp_path / "bare" / "model.safetensors"))
    found = []
    for base in (pool["base"], str(tmp_path / "bare")):
        backbone = type(pool["backbone"]())(base)
        vectors = TaskVectors(base, pool["experts"], exclude=pool["exclude"])
        merged = MergedModel(backbone, vectors, LayerWise(vectors, init=0.3))
        backbone.build_heads(TASKS, vectors.checkpoints)
        merged.merge()
        states = [{name: value.clone() for name, value in backbone.network.state_dict().items()}]
        for task in TASKS:
            merged.fill_expert(task)
            states.append({name: value.clone() for name, value in backbone.network.state_dict().items()})
            states.append(backbone.heads[task].state_dict())
            coefficients = Coefficients(vectors, merged.parametrization, layout=backbone.layout())
            place = export(coefficients, tmp_path / f"{task} {len(found)}", task=task)
            whole, report = backbone.loader.from_pretrained(place, output_loading_info=True)
            assert not report["missing_keys"] and not report["unexpected_keys"]
            states.append(whole.state_dict())
        found.append(states)
    for with_prefix, without in zip(*found, strict=True):
        assert with_prefix.keys() == without.keys()
        assert all(torch.equal(with_prefix[name], without[name]) for name in with_prefix)
