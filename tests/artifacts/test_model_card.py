"""The model card: what it names and in which numbers, and that no path of this machine is in it."""

import torch
import yaml

from adamerge.artifacts.coefficients import Coefficients
from adamerge.artifacts.model_card import card
from adamerge.parametrizations import LayerWise
from adamerge.task_vectors.task_vectors import TaskVectors


def made(protocol=None):
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    experts = {task: {name: torch.full((2,), float(k)) for name in base} for k, task in enumerate(("cars", "dtd"), 1)}
    vectors = TaskVectors(base, experts)
    parametrization = LayerWise(vectors)
    parametrization.load_values({"a": torch.tensor([[0.25], [-1.0]]), "b": torch.tensor([[0.0], [0.12345]])})
    return Coefficients(vectors, parametrization, step=7, protocol=protocol or {})


def test_it_has_the_front_matter_of_a_merge():
    """A base in memory has no name that others know it by, so none is claimed."""
    assert yaml.safe_load(card(made()).split("---")[1]) == {"tags": ["merge", "adamerge"]}


def test_it_has_the_coefficients_of_each_expert_and_group():
    text = card(made())
    assert "plus 2 experts, merged by\nLayerWise coefficients after 7 steps" in text
    assert "| group | cars | dtd |\n|---|---|---|\n| `a` | 0.2500 | -1.0000 |\n| `b` | 0.0000 | 0.1235 |\n" in text


def test_it_names_every_model_by_its_fingerprint():
    coefficients = made()
    vectors, text = coefficients.task_vectors, card(coefficients)
    assert f"(sha256 `{vectors.base.fingerprint[:16]}`) plus" in text
    for task, expert in vectors.checkpoints.items():
        assert f"- `{task}`: `" in text and f"(sha256 `{expert.fingerprint[:16]}`)" in text


def test_it_says_which_data_were_used():
    assert "## Data\n\n- no data were used\n" in card(made())
    assert "## Data\n\n- transductive: True\n- seed: 1\n" in card(made({"transductive": True, "seed": 1}))
