"""Vision-language models: the image is context, the response is predicted."""

import pytest
import torch
import transformers
from pico import pico_pool, pictures

from adamerge.backbones import IGNORED, VisionLanguage
from adamerge.backbones.inputs import stack
from adamerge.errors import CheckpointError, DataError

SAMPLE = {"image": pictures()[0], "question": "what?", "response": "abc"}


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return pico_pool("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def backbone(pool):
    return pool["backbone"]()


def predicted(backbone, sample):
    found = backbone.preprocess(sample)
    tokens = backbone.processor.tokenizer.convert_ids_to_tokens(found["input_ids"].tolist())
    return [token for token, counted in zip(tokens, found["predicted"].tolist(), strict=True) if counted]


def test_the_response_is_predicted_and_never_the_image(pool, backbone, monkeypatch):
    assert backbone.preprocess(SAMPLE)["input_ids"].tolist().count(4) == 4
    assert predicted(backbone, SAMPLE) == ["a", "b", "c", "</s>"]
    question = [*"user", *"what?", "</s>"]
    assert predicted(backbone, SAMPLE | {"response": None}) == question
    whole = VisionLanguage(pool["base"], response_only=False)
    assert predicted(whole, SAMPLE) == [*question, "<s>", *"assistant", "a", "b", "c", "</s>"]
    monkeypatch.setattr(whole.processor, "chat_template", None)
    monkeypatch.setattr(whole, "response_only", True)
    assert predicted(whole, SAMPLE) == ["a", "b", "c", "</s>"]


def test_logits_and_masks(pool, backbone):
    samples = pool["samples"]["one"]
    inputs = stack([backbone.preprocess(sample) for sample in samples])
    network = transformers.AutoModelForImageTextToText.from_pretrained(pool["base"]).eval()
    with torch.no_grad():
        encoded = backbone.encode(inputs, [0, -1])
        logits = backbone.output(encoded, "one").logits
        given = {name: inputs[name] for name in pool["inputs"]}
        own = network(**given, output_hidden_states=True)
    assert torch.equal(logits, own.logits)
    assert torch.equal(encoded.hidden[1], own.hidden_states[-1])
    image = inputs["input_ids"] == 4
    assert not (encoded.hidden_mask & image).any() and not (encoded.mask & image).any()
    assert (encoded.hidden_mask | image).equal(inputs["attention_mask"].bool())
    for row, sample in enumerate(samples):
        labels = backbone.labels(backbone.preprocess(sample))
        assert encoded.mask[row, : len(labels)].tolist() == (labels != IGNORED).tolist()


def test_an_image_that_does_not_fit_is_refused(pool):
    short = VisionLanguage(pool["base"], max_length=5)
    with pytest.raises(DataError, match="4 tokens of the image"):
        short.preprocess(SAMPLE)


def test_a_language_model_is_none(tmp_path):
    with pytest.raises(CheckpointError):
        VisionLanguage(pico_pool("llama", tmp_path)["base"])
