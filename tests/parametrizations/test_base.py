"""Setting values: exactly these groups and shapes, or nothing is changed."""

import pytest
import torch

from adamerge.parametrizations import LayerWise
from adamerge.task_vectors.task_vectors import TaskVectors


@pytest.fixture
def parametrization():
    base = {"a": torch.zeros(3), "b": torch.zeros(2)}
    return LayerWise(TaskVectors(base, {"one": {n: v + 1 for n, v in base.items()}}), init=0.3)


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ({"a": torch.ones(1, 1)}, KeyError, r"\['b'\]"),
        ({"a": torch.ones(1, 1), "b": torch.ones(1, 1), "c": torch.ones(1, 1)}, KeyError, r"\['c'\]"),
        ({"a": torch.ones(1, 1), "b": torch.ones(1, 2)}, ValueError, r"'b': expected shape \(1, 1\), got \(1, 2\)"),
    ],
)
def test_what_does_not_fit_changes_nothing(parametrization, values, error, says):
    before = parametrization.w.detach().clone()
    with pytest.raises(error, match=says):
        parametrization.load_values(values)
    assert torch.equal(parametrization.w, before)


def test_values_are_views_that_carry_no_gradient_and_loading_sets_them(parametrization):
    parametrization.load_values({"a": torch.tensor([[0.5]]), "b": torch.tensor([[-1.0]])})
    values = parametrization.values()
    assert {group: value.item() for group, value in values.items()} == {"a": 0.5, "b": -1.0}
    assert not any(value.requires_grad for value in values.values())
    assert all(value.requires_grad for value in parametrization.coefficients().values())
    values["a"].fill_(2.0)
    assert parametrization.coefficients()["a"].item() == 2.0
