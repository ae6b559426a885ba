"""The models of a coefficient file: moved, changed, swapped, gone."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from adamerge.artifacts.coefficients import load_coefficients
from adamerge.artifacts.model_sources import check_buffers
from adamerge.errors import CheckpointError, CoefficientsError
from adamerge.task_vectors.task_vectors import TaskVectors

from .test_coefficients import rewritten, set_


@pytest.mark.parametrize("who", ["base", "cars", "dtd"])
def test_one_changed_weight_is_refused_by_name(saved, models, tmp_path, who):
    other = load_file(models["base"] if who == "base" else models["experts"][who])
    other["b"][1] = torch.nextafter(other["b"][1], torch.tensor(math.inf))
    save_file(other, tmp_path / "other.safetensors")
    moved = (
        {"base": tmp_path / "other.safetensors"}
        if who == "base"
        else {"experts": {who: tmp_path / "other.safetensors"}}
    )
    name = "the base" if who == "base" else f"expert '{who}'"
    with pytest.raises(CoefficientsError, match=f"{name} at .*other.safetensors is not the model") as found:
        load_coefficients(saved, **moved)
    assert found.value.expected != found.value.got and "--allow-other-models" in found.value.todo
    assert load_coefficients(saved, **moved, verify=False).step == 5


def test_swapped_experts_are_refused(saved, models):
    experts = {"cars": models["experts"]["dtd"], "dtd": models["experts"]["cars"]}
    with pytest.raises(CoefficientsError, match="expert 'cars' at .*dtd.safetensors is not the model"):
        load_coefficients(saved, experts=experts)


def test_moved_models_are_found_where_one_says_and_unknown_names_are_refused(saved, models, tmp_path):
    save_file(load_file(models["experts"]["cars"]), tmp_path / "moved.safetensors")
    loaded = load_coefficients(saved, experts={"cars": tmp_path / "moved.safetensors"})
    assert loaded.task_vectors.checkpoints["cars"].location.endswith("moved.safetensors")
    with pytest.raises(CoefficientsError, match="has no expert 'boats'"):
        load_coefficients(saved, experts={"boats": tmp_path / "moved.safetensors"})


def test_a_model_that_is_gone_is_named(saved, tmp_path):
    file = rewritten(saved, tmp_path / "c", set_("experts", "dtd", "source", "/nowhere/dtd.safetensors"))
    with pytest.raises(CheckpointError, match="/nowhere/dtd.safetensors"):
        load_coefficients(file)


def test_a_buffer_is_a_floating_point_tensor_of_the_base_that_is_not_merged():
    base = {"w": torch.zeros(2), "mean": torch.zeros(3), "count": torch.tensor(0)}
    vectors = TaskVectors(base, {"cars": base}, include=["w"])
    check_buffers({"mean": torch.ones(3)}, vectors)
    for name, value in {"w": torch.ones(2), "count": torch.tensor(1), "none": torch.ones(1)}.items():
        with pytest.raises(ValueError, match=f"buffer '{name}' is no floating-point tensor"):
            check_buffers({name: value}, vectors)
    with pytest.raises(ValueError, match=r"buffer 'mean' is \(2,\), in the base \(3,\)"):
        check_buffers({"mean": torch.ones(2)}, vectors)
