"""Zero-shot heads: the mean of normalised embeddings, normalised."""

from types import SimpleNamespace

import pytest
import torch

from adamerge.backbones.zero_shot import ZeroShotHead, class_embeddings
from adamerge.errors import DataError

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
