"""Task arithmetic as transforms: negation, scaling, analogies, by name and with names of their own."""

import pytest
import torch

from adamerge.artifacts.coefficients import Coefficients, load_coefficients, save_coefficients
from adamerge.errors import CoefficientsError, ConfigError
from adamerge.parametrizations import LayerWise, TaskWise
from adamerge.task_vectors.storage import Resident
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import Combine, Scale

BASE = {"w": torch.zeros(2, 2), "b": torch.zeros(3)}
EXPERTS = {"a": 1.0, "b": 10.0, "c": 100.0}


def vectors(*transforms, base=BASE):
    experts = {task: {n: v + value * torch.arange(1.0, v.numel() + 1).view(v.shape) for n, v in base.items()}
               for task, value in EXPERTS.items()}  # fmt: skip
    return TaskVectors(base, experts, transforms)


def test_negation_and_scale_by_hand():
    found = vectors(Scale({"b": -1.0, "c": 0.5}))
    assert found.experts == ("a", "b", "c")
    assert found["b"].dense().tolist() == [[1, 2, 3], [-10, -20, -30], [50, 100, 150]]


def test_the_analogy_by_hand():
    """a : b = c : d, so d = c + b - a."""
    found = vectors(Combine({"d": {"a": -1, "b": 1, "c": 1}}))
    assert found.experts == ("d",) and list(found.checkpoints) == ["a", "b", "c"]
    assert found["b"].dense().tolist() == [[109, 218, 327]]
    merged = TaskWise(found, init=1.0)
    assert merged.w.shape == (1, 1) and merged("b", found["b"]).tolist() == [109, 218, 327]


def test_old_experts_stay_only_where_they_are_named():
    found = vectors(Combine({"c": {"c": 1}, "sum": {"a": 1, "b": 1}}))
    assert found.experts == ("c", "sum")
    assert found["b"].dense().tolist() == [[100, 200, 300], [11, 22, 33]]


def test_without_arguments_nothing_changes():
    plain, same = vectors(), vectors(Scale(), Combine())
    assert plain.experts == same.experts
    for name in plain:
        assert torch.equal(plain[name].dense(), same[name].dense())


def test_gradients_reach_the_coefficients_of_the_new_experts():
    found = vectors(Combine({"c": {"c": 1}, "sum": {"a": 1, "b": 1}}), Scale({"sum": -2.0}))
    parametrization = LayerWise(found)
    parametrization("b", found["b"]).sum().backward()
    column = list(parametrization.values()).index("b")
    assert parametrization.w.grad[:, column].tolist() == [600.0, -132.0]


def test_held_and_read_merge_to_the_same_bits():
    torch.manual_seed(0)
    found = vectors(
        Combine({"d": {"a": -0.3, "b": 0.7, "c": 1.1}, "e": {"b": 0.1, "c": 0.2}}), base={"w": torch.randn(7, 5)}
    )
    held = Resident().place(found, torch.device("cpu"))
    coefficients = torch.tensor([[0.3], [0.6]])
    from adamerge.deltas.groups import Whole

    assert torch.equal(held["w"].combine(coefficients, Whole()), found["w"].combine(coefficients, Whole()))


@pytest.mark.parametrize("transform", [Scale({"x": 1.0}), Combine({"d": {"a": 1, "x": 1}})], ids=["scale", "combine"])
def test_unknown_experts_are_refused_by_name(transform):
    with pytest.raises(ConfigError, match=r"there is no expert 'x'"):
        vectors(transform)


def test_a_sum_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="'d' is a sum of nothing"):
        Combine({"d": {}})


def test_the_coefficient_file_keeps_new_names_and_old_models(tmp_path):
    found = vectors(Combine({"d": {"a": -1, "b": 1}, "c": {"c": 1}}), Scale({"d": 0.5}))
    parametrization = TaskWise(found)
    with torch.no_grad():
        parametrization.w.copy_(torch.tensor([[0.25], [0.75]]))
    coefficients = Coefficients(found, parametrization)
    assert coefficients.table() == {"model": {"d": [0.25], "c": [0.75]}}
    save_coefficients(coefficients, tmp_path / "c.safetensors")
    with pytest.raises(CoefficientsError):
        load_coefficients(tmp_path / "c.safetensors", experts={"d": BASE})
    loaded = load_coefficients(
        tmp_path / "c.safetensors", BASE, {task: vectors().checkpoints[task] for task in EXPERTS}
    )
    assert loaded.task_vectors.experts == ("d", "c") and loaded.table() == coefficients.table()
    for name in found:
        assert torch.equal(loaded.parametrization(name, loaded.task_vectors[name]), parametrization(name, found[name]))
