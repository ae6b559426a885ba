"""Text encoders: sequence classifiers and sentence encoders agree with transformers and with the formula."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers
from pico import TASKS, TEXTS, pico_pool
from safetensors.torch import load_file, save_file

from adamerge import LayerWise, MergedModel, TaskVectors
from adamerge.backbones import SentenceClassifier, SequenceClassifier
from adamerge.backbones.inputs import stack
from adamerge.errors import ConfigError, DataError


@pytest.mark.parametrize("kind", ["bert", "bert_mlm", "roberta"])
def test_filled_with_an_expert_it_is_that_expert(kind, tmp_path):
    pool = pico_pool(kind, tmp_path)
    backbone = pool["backbone"]()
    vectors = TaskVectors(pool["base"], pool["experts"], exclude=pool["exclude"])
    merged = MergedModel(backbone, vectors, LayerWise(vectors, init=0.3))
    backbone.build_heads(TASKS, vectors.checkpoints)
    for task, classes in (("one", 3), ("two", 4)):
        merged.fill_expert(task)
        inputs = stack([backbone.preprocess(sample) for sample in pool["samples"][task]])
        expert = transformers.AutoModelForSequenceClassification.from_pretrained(pool["experts"][task]).eval()
        text = backbone.tokenizer(
            [sample if isinstance(sample, str) else tuple(sample.values()) for sample in pool["samples"][task]],
            padding=True,
        )
        ids, attended = torch.tensor(text["input_ids"]), torch.tensor(text["attention_mask"])
        ids = ids.masked_fill(attended == 0, expert.config.pad_token_id)
        with torch.no_grad():
            encoded = merged(inputs, [0, -1])
            logits = backbone.output(encoded, task).logits
            own = expert(input_ids=ids, attention_mask=attended, output_hidden_states=True)
        assert logits.shape == (3, classes)
        assert torch.allclose(logits, own.logits, atol=1e-6)
        assert torch.allclose(encoded.hidden[1], own.hidden_states[-1], atol=1e-6)
        assert encoded.mask is None and encoded.hidden_mask.sum(dim=1).tolist() == attended.sum(dim=1).tolist()
        assert not any(parameter.requires_grad for parameter in backbone.heads[task].parameters())


def test_sentence_classifiers_are_the_formula(tmp_path):
    pool = pico_pool("sentence", tmp_path)
    backbone = SentenceClassifier(pool["base"], scale=7.0)
    network = transformers.AutoModel.from_pretrained(pool["base"]).eval()

    def embed(text):
        ids = torch.tensor([backbone.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            mean = network(input_ids=ids).last_hidden_state[0].double().mean(dim=0)
        return mean / mean.norm()

    backbone.build_heads(TASKS, {})
    for name, task in TASKS.items():
        rows = [sum(embed(template.format(word)) for template in task.templates) for word in task.classnames]
        head = torch.stack([row / row.norm() for row in rows])
        expected = 7.0 * torch.stack([embed(text) for text in TEXTS]) @ head.T
        with torch.no_grad():
            inputs = stack([backbone.preprocess(text) for text in TEXTS])
            found = backbone.output(backbone.encode(inputs), name).logits
        assert (found.double() - expected).abs().max() <= 1e-5
    assert not backbone.trains("pooler.dense.weight") and backbone.trains("embeddings.word_embeddings.weight")


def test_an_encoder_that_was_saved_without_a_pooler_is_the_same(tmp_path):
    whole = Path(pico_pool("sentence", tmp_path)["base"])
    shutil.copytree(whole, tmp_path / "bare")
    weights = load_file(whole / "model.safetensors")
    bare = {name: value for name, value in weights.items() if not name.startswith("pooler.")}
    assert len(bare) == len(weights) - 2
    save_file(bare, tmp_path / "bare/model.safetensors", {"format": "pt"})
    features = []
    for folder in (whole, tmp_path / "bare"):
        backbone = SentenceClassifier(str(folder))
        with torch.no_grad():
            features.append(backbone.encode(stack([backbone.preprocess("a b c")])).features)
    assert torch.equal(*features)


def test_texts_are_cut_and_empty_ones_refused(tmp_path):
    pool = pico_pool("bert", tmp_path)
    backbone = SequenceClassifier(pool["base"], max_length=6)
    assert len(backbone.preprocess("abcdefghijk")["input_ids"]) == 6
    assert len(backbone.preprocess({"a": "abcdefg", "b": "h"})["input_ids"]) == 6
    for sample in ("", {"a": "", "b": ""}):
        with pytest.raises(DataError, match="the text is empty"):
            backbone.preprocess(sample)
    for sample in ({"a": "b", "c": "d", "e": "f"}, {"a": 5}, []):
        with pytest.raises(DataError, match="no known form"):
            backbone.preprocess(sample)
    with pytest.raises(ConfigError, match="max_length=49"):
        SequenceClassifier(pool["base"], max_length=49)
