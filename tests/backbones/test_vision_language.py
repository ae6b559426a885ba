"""Vision-language models: the image is context, the response is predicted; images of any size share a batch."""

import pytest
import torch
import transformers
from pico import VISION_LANGUAGE, pico_pool, pictures, pictures_of_sizes

from adamerge.backbones import IGNORED, VisionLanguage
from adamerge.backbones.inputs import join, packed, rows, stack
from adamerge.errors import CheckpointError, DataError

SAMPLE = {"image": pictures()[0], "question": "what?", "response": "abc"}
MARKS = {"llava": "<image>", "qwen2_vl": "<|image_pad|>", "internvl": "<IMG_CONTEXT>"}
# pieces of the images of 16x16, 32x16 and 16x24 pixels (width first), and tokens of each
PIECES = {"llava": [1, 1, 1], "qwen2_vl": [16, 32, 24], "internvl": [1, 3, 3]}
TOKENS = {"llava": [4, 4, 4], "qwen2_vl": [4, 8, 6], "internvl": [4, 12, 12]}


@pytest.fixture(scope="module", params=VISION_LANGUAGE)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pool(kind, tmp_path_factory):
    return pico_pool(kind, tmp_path_factory.mktemp(kind))


@pytest.fixture(scope="module")
def backbone(pool):
    return pool["backbone"]()


@pytest.fixture
def ready(pool, backbone):
    """Preprocessed samples with images of three sizes."""
    return [
        backbone.preprocess(sample | {"image": image})
        for sample, image in zip(pool["samples"]["one"], pictures_of_sizes(), strict=True)
    ]


def predicted(backbone, sample):
    found = backbone.preprocess(sample)
    tokens = backbone.processor.tokenizer.convert_ids_to_tokens(found["input_ids"].tolist())
    return [token for token, counted in zip(tokens, found["predicted"].tolist(), strict=True) if counted]


def test_the_response_is_predicted_and_never_the_image(kind, pool, backbone, monkeypatch):
    assert predicted(backbone, SAMPLE) == ["a", "b", "c", "</s>"]
    frame = {"llava": [], "qwen2_vl": ["<|vision_start|>", "<|vision_end|>"], "internvl": ["<img>", "</img>"]}[kind]
    question = [*"user", *frame, *"what?", "</s>"]
    assert predicted(backbone, SAMPLE | {"response": None}) == question
    whole = VisionLanguage(pool["base"], response_only=False)
    assert predicted(whole, SAMPLE) == [*question, "<s>", *"assistant", "a", "b", "c", "</s>"]
    monkeypatch.setattr(whole.processor, "chat_template", None)
    plain = predicted(whole, SAMPLE)
    assert plain == [*frame[1:], *"what?", "a", "b", "c", "</s>"], "nothing stands before the first"
    monkeypatch.setattr(whole, "response_only", True)
    assert predicted(whole, SAMPLE) == ["a", "b", "c", "</s>"]


def test_what_a_template_writes_behind_the_response_is_not_predicted(backbone, monkeypatch):
    text, [(start, end)] = backbone._text(SAMPLE["question"], SAMPLE["response"])
    assert text[start:end] == "abc</s>"
    monkeypatch.setattr(backbone, "_text", lambda question, response: (f"{text} 12", [(start, end)]))
    assert predicted(backbone, SAMPLE) == ["a", "b", "c", "</s>"]
    monkeypatch.setattr(backbone, "_text", lambda question, response: (text, [(start, start)]))
    with pytest.raises(DataError, match="no token to predict"):
        backbone.preprocess(SAMPLE)


def test_an_image_has_as_many_pieces_as_its_size_asks_for(kind, backbone, ready):
    assert [int(sample["pixel_values.count"]) for sample in ready] == PIECES[kind]
    assert [len(sample["pixel_values"]) for sample in ready] == PIECES[kind]
    tokens = [backbone.processor.tokenizer.convert_ids_to_tokens(sample["input_ids"].tolist()) for sample in ready]
    assert [row.count(MARKS[kind]) for row in tokens] == TOKENS[kind]


def test_logits_and_masks(kind, pool, backbone, ready):
    """What the network makes of what its own processor makes of all samples at once."""
    samples = pool["samples"]["one"]
    inputs = stack(ready)
    texts = [backbone._text(sample["question"], sample["response"])[0] for sample in samples]
    own_inputs = backbone.processor(
        images=pictures_of_sizes(),
        text=texts,
        padding=True,
        padding_side="right",
        return_tensors="pt",
        add_special_tokens=False,
    )
    assert set(own_inputs) >= set(pool["inputs"])
    assert all(torch.equal(packed(inputs)[name], own_inputs[name]) for name in pool["inputs"])
    network = transformers.AutoModelForImageTextToText.from_pretrained(pool["base"]).eval()
    with torch.no_grad():
        encoded = backbone.encode(inputs, [0, -1])
        logits = backbone.output(encoded, "one").logits
        own = network(**own_inputs, output_hidden_states=True)
    assert torch.equal(logits, own.logits)
    assert torch.equal(encoded.hidden[0], own.hidden_states[0]) and torch.equal(
        encoded.hidden[1], own.hidden_states[-1]
    )
    image = inputs["input_ids"] == backbone.image_token
    assert image.sum(dim=1).tolist() == TOKENS[kind]
    assert not (encoded.hidden_mask & image).any() and not (encoded.mask & image).any()
    assert (encoded.hidden_mask | image).equal(inputs["attention_mask"].bool())
    for row, sample in enumerate(ready):
        labels = backbone.labels(sample)
        assert encoded.mask[row, : len(labels)].tolist() == (labels != IGNORED).tolist()
        assert not encoded.mask[row, len(labels) :].any()


def test_the_image_predicts_no_word_of_the_question_behind_it(backbone):
    sample = backbone.preprocess(SAMPLE | {"response": None})
    with torch.no_grad():
        mask = backbone.encode(stack([sample])).mask[0]
    image = sample["input_ids"] == backbone.image_token
    last = int(image.nonzero()[-1])
    assert sample["predicted"][last + 1] and not mask[last] and mask[last + 1]
    assert torch.equal(mask, backbone.labels(sample) != IGNORED) and not (mask & image).any()


def results(backbone, inputs):
    """Of each sample: logits, hidden states, and the loss of a made-up objective at the positions that count."""
    encoded = backbone.encode(inputs, [0, -1])
    output = backbone.output(encoded, "one")
    loss = output.mean(output.logits.logsumexp(dim=-1) - output.logits[..., 7])
    return output.logits, encoded.hidden, loss


def gradients(backbone, *batches):
    """Of the sum of all samples' losses, by parameter."""
    backbone.network.zero_grad()
    for inputs in batches:
        results(backbone, inputs)[2].sum().backward()
    named = backbone.network.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def close(found, expected):
    return (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_a_batch_of_images_of_different_sizes_is_each_alone(backbone, ready):
    both, alone = stack(ready), [stack([sample]) for sample in ready]
    with torch.no_grad():
        logits, hidden, losses = results(backbone, both)
        for row, inputs in enumerate(alone):
            own_logits, own_hidden, own_loss = results(backbone, inputs)
            length = own_logits.shape[1]
            assert close(logits[row, :length], own_logits[0]) and close(losses[row], own_loss[0])
            assert all(close(states[row, :length], own[0]) for states, own in zip(hidden, own_hidden, strict=True))
            # micro-batches are cut from the padded batch
            assert close(results(backbone, rows(both, slice(row, row + 1)))[0][0, :length], own_logits[0])
    joint = gradients(backbone, both)
    assert all(bool(value.any()) for name, value in joint.items() if "patch_embed" in name)
    separate = gradients(backbone, *alone)
    largest = max(float(value.abs().max()) for value in separate.values())
    for name, value in separate.items():
        assert (joint[name] - value).abs().max() <= 1e-5 * largest, name


def test_batches_of_tasks_are_joined(backbone, ready):
    joined, together = join([stack(ready[:1]), stack(ready[1:])]), stack(ready)
    assert joined.keys() == together.keys()
    assert all(torch.equal(joined[name], together[name]) for name in joined)


def test_an_image_changes_its_own_row_alone(backbone, ready):
    other = [*ready[:1], ready[1] | {"pixel_values": ready[1]["pixel_values"].flip(0, -1)}, *ready[2:]]
    with torch.no_grad():
        before, after = results(backbone, stack(ready))[0], results(backbone, stack(other))[0]
    moved = (before - after).abs().amax(dim=(1, 2))
    assert moved[0] < 1e-6 and moved[2] < 1e-6 and moved[1] > 1e-3


def test_an_image_that_does_not_fit_is_refused(kind, pool):
    short = VisionLanguage(pool["base"], max_length=5)
    with pytest.raises(DataError, match=f"{TOKENS[kind][1]} tokens of the image"):
        short.preprocess(SAMPLE | {"image": pictures_of_sizes()[1]})


def test_what_does_not_fit_of_the_words_is_cut(backbone, ready, monkeypatch):
    whole = ready[0]
    monkeypatch.setattr(backbone, "response_only", False)
    monkeypatch.setattr(backbone, "max_length", 14)
    cut = backbone.preprocess(SAMPLE | {"image": pictures_of_sizes()[0]})
    for name in ("input_ids", "attention_mask", *(n for n in whole if n == "mm_token_type_ids")):
        assert torch.equal(cut[name], whole[name][:14])
    assert torch.isfinite(backbone.encode(stack([cut])).features).all()


@pytest.mark.parametrize("place", ["question", "response"])
def test_the_mark_of_an_image_among_the_words_is_refused(kind, backbone, place):
    with pytest.raises(DataError, match="stands for more than words"):
        backbone.preprocess(SAMPLE | {place: f"a {MARKS[kind]} b"})


def test_a_language_model_is_none(tmp_path):
    with pytest.raises(CheckpointError):
        VisionLanguage(pico_pool("llama", tmp_path)["base"])
