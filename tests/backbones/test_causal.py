"""Causal language models: which tokens are predicted, and the network's own logits."""

import pytest
import torch
import transformers
from pico import CAUSAL, CHAT, TEXTS, pico_pool

from adamerge.backbones import IGNORED, CausalLM
from adamerge.backbones.inputs import stack
from adamerge.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return pico_pool("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def backbone(pool):
    return pool["backbone"]()


def test_of_a_text_all_but_the_first_token_are_predicted(backbone):
    sample = backbone.preprocess("merge")
    ids = backbone.tokenizer("merge")["input_ids"]
    assert sample["input_ids"].tolist() == ids and sample["attention_mask"].tolist() == [1] * 5
    assert sample["predicted"].tolist() == [0, 1, 1, 1, 1]
    assert backbone.labels(sample).tolist() == [*ids[1:], IGNORED]


def test_of_a_response_its_tokens_and_its_end_are_predicted(backbone):
    sample = backbone.preprocess({"prompt": "ab", "response": "cd"})
    assert sample["predicted"].tolist() == [0, 0, 1, 1, 1]
    c, d = backbone.tokenizer("cd")["input_ids"]
    assert sample["input_ids"].tolist()[2:] == [c, d, 2]
    assert backbone.labels(sample).tolist() == [IGNORED, c, d, 2, IGNORED]


def test_of_a_conversation_the_assistants_turns_are_predicted(backbone):
    turns = [("user", "ab"), ("assistant", "cd"), ("user", "e"), ("assistant", "f")]
    sample = backbone.preprocess({"messages": [{"role": role, "content": text} for role, text in turns]})
    tokens = backbone.tokenizer.convert_ids_to_tokens(sample["input_ids"].tolist())
    said = [token for token, counted in zip(tokens, sample["predicted"].tolist(), strict=True) if counted]
    assert said == ["c", "d", "</s>", "f", "</s>"]


def test_the_whole_of_a_sample_may_be_predicted(pool):
    backbone = CausalLM(pool["base"], response_only=False)
    assert backbone.preprocess({"prompt": "ab", "response": "cd"})["predicted"].tolist() == [0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ("", "no token to predict"),
        ("a", "no token to predict"),
        ({"prompt": "ab", "response": ""}, "the response is empty"),
        ({"prompt": "a" * 60, "response": "b"}, "no token to predict in the first 48 of 62"),
        ({"messages": [{"role": "user", "content": "ab"}]}, "no token to predict"),
        ({"question": "ab"}, "no known form"),
        (5, "no known form"),
    ],
)
def test_a_sample_with_nothing_to_predict_is_refused(backbone, sample, words):
    with pytest.raises(DataError, match=words):
        backbone.preprocess(sample)


def test_without_a_template_a_conversation_is_refused(backbone, monkeypatch):
    monkeypatch.setattr(backbone.tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="no chat template"):
        backbone.preprocess({"messages": [{"role": "assistant", "content": "ab"}]})


def test_of_a_conversation_all_may_be_predicted_whatever_the_template_does(pool, monkeypatch):
    """Where every token counts, nobody asks where a turn stands."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    twice = "{{ messages | length }}" + CHAT.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['content'] }}")
    for response_only in (True, False):
        backbone = CausalLM(pool["base"], response_only=response_only)
        monkeypatch.setattr(backbone.tokenizer, "chat_template", twice)
        if response_only:
            with pytest.raises(DataError, match="turn 1 differently"):
                backbone.preprocess({"messages": turns})
        else:
            predicted = backbone.preprocess({"messages": turns})["predicted"].tolist()
            assert predicted == [0] + [1] * (len(predicted) - 1) and len(predicted) > 8


@pytest.mark.parametrize("kind", CAUSAL)
def test_logits_hidden_states_and_masks_are_the_networks_own(kind, tmp_path):
    pool = pico_pool(kind, tmp_path)
    backbone = pool["backbone"]()
    inputs = stack([backbone.preprocess(sample) for sample in pool["samples"]["two"]])
    with torch.no_grad():
        encoded = backbone.encode(inputs, [0, 1, -1])
        logits = backbone.output(encoded, "two").logits
        network = transformers.AutoModelForCausalLM.from_pretrained(pool["base"]).eval()
        own = network(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], output_hidden_states=True)
    assert torch.equal(logits, own.logits)
    for state, number in zip(encoded.hidden, (0, 1, 2), strict=True):
        assert torch.equal(state, own.hidden_states[number])
    for row, sample in enumerate(pool["samples"]["two"]):
        labels = backbone.labels(backbone.preprocess(sample))
        assert encoded.mask[row, : len(labels)].tolist() == (labels != IGNORED).tolist()
        assert not encoded.mask[row, len(labels) :].any()
        assert encoded.hidden_mask[row].tolist() == inputs["attention_mask"][row].bool().tolist()


def test_padding_changes_nothing(backbone):
    short, long = backbone.preprocess(TEXTS[0]), backbone.preprocess(TEXTS[2])
    with torch.no_grad():
        alone = backbone.output(backbone.encode(stack([short])), "one").logits[0]
        together = backbone.output(backbone.encode(stack([short, long])), "one").logits[0]
    assert torch.allclose(alone, together[: len(alone)], atol=1e-5)


def test_a_cap_on_the_logits_is_the_networks_own(tmp_path):
    from pico import DECODER, random_model, tokenizer

    config = transformers.Gemma2Config(**DECODER, head_dim=8, final_logit_softcapping=0.5, query_pre_attn_scalar=8)
    network = random_model(transformers.AutoModelForCausalLM, config, 0)
    network.save_pretrained(tmp_path)
    tokenizer(tmp_path)
    backbone = CausalLM(str(tmp_path))
    inputs = stack([backbone.preprocess(text) for text in TEXTS])
    with torch.no_grad():
        logits = backbone.output(backbone.encode(inputs), "one").logits
        own = backbone.network(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(logits, own) and logits.abs().max() <= 0.5


def test_lengths_and_hidden_states_out_of_range_are_refused(pool, backbone):
    assert backbone.max_length == 48
    for length in (1, 49):
        with pytest.raises(ConfigError, match=f"max_length={length}"):
            CausalLM(pool["base"], max_length=length)
    inputs = stack([backbone.preprocess("merge")])
    for number in (3, -4):
        with pytest.raises(ConfigError, match=f"no hidden state {number}"):
            backbone.encode(inputs, [number])
