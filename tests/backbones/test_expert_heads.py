"""Heads that are each expert's own: found, read, and refused when they do not fit."""

import pytest
import torch
import transformers
from pico import TASKS, pico_pool, random_model, tokenizer
from safetensors.torch import load_file, save_file

from adamerge.backbones import SequenceClassifier
from adamerge.errors import CheckpointError
from adamerge.sources import open_checkpoint


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
