"""Patterns: a few that match all of some names and none of the others, whatever the names are."""

from fnmatch import fnmatchcase

import pytest
import torch
import transformers
from pico import ENCODER, VISION, random_model

from adamerge.checkpoints.name_patterns import MOST, excluding, globs, numbered_prefix
from adamerge.task_vectors.task_vectors import TaskVectors


def matched(patterns: list[str], names: list[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


@pytest.mark.parametrize(
    ("names", "others", "expected"),
    [
        ([], ["a"], []),
        (["a"], [], ["a"]),
        (["a.x.w", "a.x.b", "b.w"], [], ["a.*", "b.w"]),
        (["a.x.w", "a.x.b"], ["a.y.w"], ["a.x.*"]),
        (["a.x.w", "a.y.w"], ["a.x.b", "b.w"], ["a.*.w"]),
        (["a.x.w", "a.y.w"], ["a.x.b"], ["*.w"]),
        (["scale", "a.w"], ["scales.w", "aa.w"], ["scale", "a.w"]),
        (["l.1.w", "l.1.b", "l.10.w"], ["l.0.w"], ["l.1.*", "l.10.w"]),
        (["fc.weight", "fc.bias"], ["conv.weight", "conv.bias"], ["fc.*"]),
        (["l1.bn1.mean", "l1.bn2.mean", "l2.bn1.mean", "l1.bn1.var"], ["l1.bn1.w"], ["*.mean", "l1.bn1.var"]),
        (["b0.w", "b1.w", "b10.w"], ["a0.w"], ["b*.w"]),
        (["b0.w", "b1.w"], ["b2.w"], ["b0.w", "b1.w"]),
    ],
)
def test_they_are_few_and_leave_the_others(names, others, expected):
    assert globs(names, others) == expected


def test_the_masks_of_an_old_gpt2_are_one_pattern():
    """Beside them lie biases of the same last name, in every layer."""
    layers = [f"transformer.h.{i}" for i in range(48)]
    masks = [f"{layer}.attn.bias" for layer in layers]
    others = [
        f"{layer}.{part}.{kind}" for layer in layers for part in ("attn.c_attn", "ln_1") for kind in ("weight", "bias")
    ]
    assert excluding(masks, others) == "pass exclude=['*.attn.bias']"


def test_both_of_an_old_gpt2s_buffers_and_nothing_else():
    layers = [f"h.{i}" for i in range(12)]
    both = [f"{layer}.attn.{kind}" for layer in layers for kind in ("bias", "masked_bias")]
    others = [f"{layer}.attn.c_attn.bias" for layer in layers]
    assert globs(both, others) == ["*.attn.bias", "*.masked_bias"]


def test_what_has_no_pattern_is_listed_as_far_as_a_line_goes():
    names = [f"{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(MOST + 2)]
    assert excluding(names, ["a0"]).endswith(" and 2 more") and repr(names[MOST - 1]) in excluding(names, ["a0"])


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_they_leave_exactly_what_is_missing(share):
    """Whatever is taken out of a real model, the patterns let the rest be merged."""
    towers = transformers.CLIPConfig(text_config=ENCODER | {"bos_token_id": 1}, vision_config=VISION, projection_dim=16)
    base = random_model(transformers.CLIPModel, towers, 0).state_dict()
    generator = torch.Generator().manual_seed(0)
    kept = [name for name in base if base[name].is_floating_point() and torch.rand((), generator=generator) > share]
    missing = [name for name in base if base[name].is_floating_point() and name not in kept]
    patterns = globs(missing, kept)
    assert matched(patterns, missing) == missing and not matched(patterns, kept)
    vectors = TaskVectors(base, {"one": {name: base[name] for name in kept}}, exclude=patterns)
    assert sorted(vectors) == sorted(kept)


def test_the_block_of_a_tensor_is_its_name_up_to_the_first_integer():
    names = {
        "visual.transformer.resblocks.3.mlp.c_fc.weight": "visual.transformer.resblocks.3",
        "stages.1.layers.0.weight": "stages.1",
        "prompts.12": "prompts.12",
        "conv1.weight": None,
        "3.weight": None,
    }
    assert {name: numbered_prefix(name) for name in names} == names
