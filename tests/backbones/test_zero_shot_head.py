"""Zero-shot heads: the mean of normalised embeddings, normalised."""

from types import SimpleNamespace

import pytest
import torch

from adamerge.backbones.zero_shot_head import ZeroShotHead, check_task, check_words, class_embeddings
from adamerge.errors import ConfigError, DataError

PLACES = {"a x": [3.0, 0.0], "b x": [0.0, 2.0], "a y": [1.0, 0.0], "b y": [5.0, 0.0]}


def test_by_hand():
    task = SimpleNamespace(classnames=["x", "y"], templates=["a {}", "b {}"])
    found = class_embeddings("t", task, lambda prompts: torch.tensor([PLACES[prompt] for prompt in prompts]))
    assert torch.allclose(found, torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0]]))
    logits = ZeroShotHead(10 * found)(torch.tensor([[0.0, 4.0]]))
    assert torch.allclose(logits, torch.tensor([[10 * 0.5**0.5, 0.0]]))


def test_many_prompts_come_in_parts():
    sizes = []

    def embed(prompts):
        sizes.append(len(prompts))
        return torch.ones(len(prompts), 2)

    class_embeddings("t", SimpleNamespace(classnames=[str(i) for i in range(300)], templates=["{}"]), embed)
    assert sizes == [256, 44]


@pytest.mark.parametrize("words", [([], ["{}"]), (["x"], [])])
def test_classes_and_templates_are_needed(words):
    task = SimpleNamespace(classnames=words[0], templates=words[1])
    with pytest.raises(DataError, match="task 't'"):
        class_embeddings("t", task, lambda prompts: torch.ones(1, 1))
    with pytest.raises(DataError, match="task 't'"):
        check_task("t", task)


@pytest.mark.parametrize("template", ["a {}", "{0}", "{} {{}}", "{:>9}", "{!r}", "{0} or {0}"])
def test_templates_with_a_place_for_the_class_name(template):
    check_words("here", ["x", "y"], [template])


@pytest.mark.parametrize("template", ["{classname}", "{0} {1}", "{} {}", "{", "}", "{0.nothing}", "{0[a]}", "{:d}"])
def test_templates_that_cannot_be_filled(template):
    with pytest.raises(ConfigError, match="^here: the template '.*' cannot be filled"):
        check_words("here", ["x", "y"], ["{}", template])


@pytest.mark.parametrize("template", ["", "a photo", "{{}}", "{.upper}"])
def test_templates_without_a_place_for_the_class_name(template):
    with pytest.raises(ConfigError, match="^here: the template '.*' has no place for the class name"):
        check_words("here", ["x", "y"], [template])


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["x", "y", "x"], "labels 0, 2 have"),
        (["x"] * 20, "labels 0, 1, 2, 3, 4, 5, 6, 7, … have"),
        (["x", " "], "label 1 is empty"),
    ],
)
def test_class_names_that_cannot_be_told_apart(names, told):
    with pytest.raises(ConfigError, match=f"^task 't': .*{told}"):
        class_embeddings("t", SimpleNamespace(classnames=names, templates=["{}"]), lambda prompts: torch.ones(1, 1))
