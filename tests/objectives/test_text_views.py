"""Views of texts: which tokens go and which stay, and that neither the batch's length nor its order matters."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pico import pico_pool

from adamerge.backbones.inputs import TextPlace, stack
from adamerge.errors import ConfigError
from adamerge.objectives import Composed, SpanCrop, TokenDropout, TokenMasking, Unchanged, View
from adamerge.objectives.views import seeds_of, uniform

BEGIN, END, MASK = 1, 2, 3
PLACE = TextPlace(("input_ids", "attention_mask", "kinds"), (0, BEGIN, END, MASK), MASK)
SEEDS = seeds_of(0, 3, torch.arange(40))
VIEWS = [TokenDropout(0.3), TokenMasking(0.3), SpanCrop(0.4)]


def of(view, place=PLACE):
    return view.of(SimpleNamespace(text_place=lambda: place))


def texts(longest=12):
    """Forty texts of 1 to 9 tokens between marks, all tokens of a batch different ones."""
    ids, attended, kinds = (torch.zeros(40, longest, dtype=torch.int64) for _ in range(3))
    for i in range(40):
        words = 1 + i % 9
        ids[i, : words + 2] = torch.tensor([BEGIN, *range(10 + 10 * i, 10 + 10 * i + words), END])
        attended[i, : words + 2] = 1
        kinds[i, : words + 2] = 1 + torch.arange(words + 2)
    return {"input_ids": ids, "attention_mask": attended, "kinds": kinds}


def shown(batch, i):
    """Of a text its tokens, of which padding must be behind the others and zeros."""
    length = int(batch["attention_mask"][i].sum())
    assert batch["attention_mask"][i, :length].all() and not batch["input_ids"][i, length:].any()
    assert not batch["kinds"][i, length:].any()
    return batch["input_ids"][i, :length].tolist()


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: type(view).__name__)
def test_a_view_depends_on_sample_and_seed_alone(view):
    view = of(view)
    whole, longer = view(texts(), SEEDS), view(texts(20), SEEDS)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:9]
    some = view({name: value[order] for name, value in texts().items()}, SEEDS[order])
    for name, value in whole.items():
        assert torch.equal(longer[name][:, :12], value) and not longer[name][:, 12:].any()
        assert torch.equal(some[name], value[order])
    assert not torch.equal(whole["input_ids"], texts()["input_ids"])


@pytest.mark.parametrize("view", [*VIEWS, Composed([TokenDropout(0.3), SpanCrop(0.4)])], ids=lambda v: type(v).__name__)
def test_no_text_gets_longer(view):
    assert not view.lengthens and not of(view).lengthens
    longer = of(view)(texts(), SEEDS)["attention_mask"] > texts()["attention_mask"]
    assert not longer.any()


def test_a_view_that_says_nothing_may_lengthen():
    class Doubled(View):
        def __call__(self, inputs, seeds):
            return {name: torch.cat([value, value], dim=1) for name, value in inputs.items()}

    assert Doubled().lengthens and Composed([TokenDropout(), Doubled()]).lengthens and not Unchanged().lengthens


def test_tokens_left_out_are_those_of_the_numbers():
    found, left = of(TokenDropout(0.3))(texts(), SEEDS), 0
    for i in range(40):
        words = texts()["input_ids"][i, 1 : 2 + i % 9].tolist()
        numbers = [float(uniform(SEEDS[i : i + 1], place)) for place in range(1, len(words) + 1)]
        right = [word for word, value in zip(words, numbers, strict=True) if value >= 0.3 or value == max(numbers)]
        assert shown(found, i) == [BEGIN, *right, END]
        # what goes with a token goes with it
        kinds = [1, *(2 + words.index(word) for word in right), len(words) + 2]
        assert found["kinds"][i, : len(kinds)].tolist() == kinds
        left += len(words) - len(right)
    assert left > 20


def test_tokens_masked_are_those_of_the_numbers():
    found = of(TokenMasking(0.3))(texts(), SEEDS)
    for i in range(40):
        words = texts()["input_ids"][i, 1 : 2 + i % 9].tolist()
        numbers = [float(uniform(SEEDS[i : i + 1], place)) for place in range(1, len(words) + 1)]
        right = [
            word if value >= 0.3 or value == max(numbers) else MASK for word, value in zip(words, numbers, strict=True)
        ]
        assert shown(found, i) == [BEGIN, *right, END]
    assert torch.equal(found["attention_mask"], texts()["attention_mask"])
    assert (found["input_ids"] == MASK).any()


def test_no_text_loses_all_of_its_tokens():
    for view in (TokenDropout(0.999), TokenMasking(0.999)):
        found = of(view)(texts(), SEEDS)
        for i in range(40):
            assert len([word for word in shown(found, i) if word >= 10]) == 1


def test_spans_are_those_of_the_numbers():
    """An even share between 0.4 and 1 of the tokens, rounded up, that begins anywhere it fits."""
    found, begins = of(SpanCrop(0.4))(texts(), SEEDS), set()
    for i in range(40):
        words = texts()["input_ids"][i, 1 : 2 + i % 9].tolist()
        share, start = (float(uniform(SEEDS[i : i + 1], place)) for place in range(2))
        length = max(1, math.ceil(len(words) * (0.4 + 0.6 * share)))
        first = int(start * (len(words) - length + 1))
        assert shown(found, i) == [BEGIN, *words[first : first + length], END]
        begins.add(first)
    assert len(begins) > 2


def test_nothing_left_out_is_the_text():
    for view in (TokenDropout(0.0), TokenMasking(0.0), SpanCrop(1.0)):
        assert all(torch.equal(value, texts()[name]) for name, value in of(view)(texts(), SEEDS).items())


def test_several_of_them_are_made_for_the_backbone_too():
    both = of(Composed([TokenDropout(0.3), Unchanged(), TokenMasking(0.3)]))(texts(), SEEDS)
    assert any(MASK in shown(both, i) for i in range(40)) and both["attention_mask"].sum() < 200 + 80


@pytest.mark.parametrize("kind", ["bert_mlm", "sentence", "gpt2", "t5"])
def test_networks_of_texts_say_where_their_text_is(kind, tmp_path):
    """A view of a batch is for the network what the shortened text is alone; special tokens are all there."""
    pool = pico_pool(kind, tmp_path)
    backbone = pool["backbone"]()
    samples = [backbone.preprocess(sample) for sample in next(iter(pool["samples"].values()))]
    inputs, place = stack(samples), backbone.text_place()
    seeds = seeds_of(0, 3, torch.arange(len(samples)))
    special = torch.isin(inputs["input_ids"], torch.tensor(place.special)) & inputs["attention_mask"].bool()
    for view in (TokenDropout(0.4), SpanCrop(0.5)):
        found = view.of(backbone)(inputs, seeds)
        assert found.keys() == inputs.keys() and found["attention_mask"].sum() < inputs["attention_mask"].sum()
        kept = torch.isin(found["input_ids"], torch.tensor(place.special)) & found["attention_mask"].bool()
        assert torch.equal(kept.sum(dim=1), special.sum(dim=1))
        with torch.no_grad():
            whole = backbone.encode(found)
            for i in range(len(samples)):
                length = int(found["attention_mask"][i].sum())
                short = {n: v[i : i + 1, :length] if n in place.along else v[i : i + 1] for n, v in found.items()}
                alone, features = backbone.encode(short), whole.features[i : i + 1]
                if features.ndim == 3:  # of positions, of which those count that the mask says
                    counts = torch.arange(length) >= 0 if whole.mask is None else whole.mask[i]
                    places = torch.nonzero(counts)[:, 0].tolist()
                    assert whole.mask is None or places == torch.nonzero(alone.mask[0])[:, 0].tolist()
                    features, alone = features[:, places], replace(alone, features=alone.features[:, places])
                assert torch.allclose(alone.features, features, atol=1e-5)


def test_a_backbone_without_texts_is_refused_and_one_without_a_mask():
    for view in VIEWS:
        with pytest.raises(ConfigError, match="is for texts"):
            of(view, None)
        with pytest.raises(ConfigError, match="is for texts of a backbone"):
            view(texts(), SEEDS)
    with pytest.raises(ConfigError, match="has no mask"):
        of(TokenMasking(), PLACE._replace(mask=None))


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (TokenDropout, {"share": 1.0}),
        (TokenMasking, {"share": -0.1}),
        (SpanCrop, {"smallest": 0.0}),
        (SpanCrop, {"smallest": 1.1}),
    ],
)
def test_numbers_out_of_range_are_refused(kind, arguments):
    with pytest.raises(ConfigError, match=kind.__name__):
        kind(**arguments)
