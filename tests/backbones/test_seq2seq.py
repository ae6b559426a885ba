"""Encoder-decoder models: the decoder starts where T5 starts, and predicts the target."""

import pytest
import torch
import transformers
from pico import pico_pool

from adamerge.backbones import IGNORED, Seq2Seq
from adamerge.backbones.inputs import stack
from adamerge.errors import ConfigError, DataError


@pytest.mark.parametrize("kind", ["t5", "t5_untied"])
def test_logits_are_the_networks_own_and_the_loss_too(kind, tmp_path):
    pool = pico_pool(kind, tmp_path)
    backbone = pool["backbone"]()
    samples = pool["samples"]["one"]
    inputs = stack([backbone.preprocess(sample) for sample in samples])
    labels = torch.nn.utils.rnn.pad_sequence(
        [backbone.labels(backbone.preprocess(sample)) for sample in samples], True, IGNORED
    )
    network = transformers.AutoModelForSeq2SeqLM.from_pretrained(pool["base"]).eval()
    with torch.no_grad():
        encoded = backbone.encode(inputs, [0, -1])
        logits = backbone.output(encoded, "one").logits
        # the library shifts the labels itself, and begins with the start token
        own = network(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=labels,
            output_hidden_states=True,
        )
    counted = labels != IGNORED
    assert torch.equal(encoded.mask, counted)
    assert torch.allclose(logits[counted], own.logits[counted], atol=1e-6)
    assert torch.allclose(encoded.hidden[1][counted], own.decoder_hidden_states[-1][counted], atol=1e-6)
    loss = torch.nn.functional.cross_entropy(logits[counted], labels[counted])
    assert float(loss) == pytest.approx(float(own.loss), rel=1e-5)


def test_what_is_predicted(tmp_path):
    backbone = pico_pool("t5", tmp_path)["backbone"]()
    sample = backbone.preprocess({"prompt": "ab", "response": "c"})
    c = backbone.tokenizer("c")["input_ids"]
    assert sample["decoder_input_ids"].tolist() == [0, *c]
    assert backbone.labels(sample).tolist() == [*c, IGNORED]
    for bare in ("ab", {"prompt": "ab"}, {"prompt": "ab", "response": None}):
        sample = backbone.preprocess(bare)
        assert sample["decoder_input_ids"].tolist() == [0] and backbone.labels(sample).tolist() == [IGNORED]
        assert backbone.encode(stack([sample])).mask.tolist() == [[True]]


@pytest.mark.parametrize("sample", ["", {"prompt": "", "response": "a"}, {"prompt": "a", "response": ""}])
def test_empty_texts_are_refused(sample, tmp_path):
    pool = pico_pool("t5", tmp_path)
    with pytest.raises(DataError, match="is empty"):
        pool["backbone"]().preprocess(sample)
    with pytest.raises(ConfigError):
        Seq2Seq(pool["base"], max_length=0)
