"""Allocation: importances are the formula's, whatever the storage, and the second stage rebuilds from its own file."""

import json

import pytest
import torch
from safetensors.torch import save_file

from adamerge.artifacts.coefficients import Coefficients, load_coefficients, save_coefficients
from adamerge.artifacts.importance import allocation_table, importances, write_importances
from adamerge.errors import ConfigError
from adamerge.parametrizations import ChunkWise, ImportanceChunkWise, LayerWise, Parametrization, TaskWise
from adamerge.parametrizations.constraints import Sigmoid
from adamerge.task_vectors.task_vectors import TaskVectors

SHAPES = {"a": (5, 7), "b": (9,), "c": (2, 2), "d": ()}


@pytest.fixture
def pool(tmp_path):
    torch.manual_seed(0)
    base = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    save_file(base, tmp_path / "base.safetensors")
    for task in ("one", "two"):
        save_file({n: v + torch.randn(v.shape) for n, v in base.items()}, tmp_path / f"{task}.safetensors")
    return {
        "base": tmp_path / "base.safetensors",
        "experts": {t: tmp_path / f"{t}.safetensors" for t in ("one", "two")},
    }


def filled(parametrization):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        parametrization.w.copy_(torch.randn(parametrization.w.shape, generator=generator))
    return parametrization


@pytest.mark.parametrize("constraint", [None, Sigmoid()], ids=["free", "sigmoid"])
@pytest.mark.parametrize("kind", [TaskWise, LayerWise, ChunkWise])
def test_importance_is_the_sum_of_moved_weights(pool, kind, constraint):
    vectors = TaskVectors(**pool)
    parametrization = filled(kind(vectors, 0.3, constraint))
    sums = {}
    for name in vectors:
        value = parametrization.values()["model" if kind is TaskWise else name].double()
        value = torch.sigmoid(value) if constraint else value
        tau = vectors[name].dense().double().view(2, -1)
        half = tau.shape[1] // 2
        columns = [0] * tau.shape[1] if value.shape[1] == 1 else [0] * half + [1] * (tau.shape[1] - half)
        sums[name] = float((value[:, columns].abs() * tau.abs()).sum())
    found = importances(Coefficients(vectors, parametrization))
    assert list(found) == list(vectors) and sum(found.values()) == pytest.approx(1.0)
    for name, value in sums.items():
        assert found[name] == pytest.approx(value / sum(sums.values()), rel=1e-6)


def test_factors_have_the_importance_of_their_product(lora):
    low = TaskVectors(lora.bases["llama"], {"one": lora.adapters["llama"], "two": lora.adapters["llama patterns"]})
    merged = {
        task: {n: lora.merged[case][n] for n in low.base}
        for task, case in (("one", "llama"), ("two", "llama patterns"))
    }
    dense = TaskVectors(lora.bases["llama"], merged)
    one, two = importances(Coefficients(low, LayerWise(low))), importances(Coefficients(dense, LayerWise(dense)))
    for name, value in one.items():
        assert value == pytest.approx(two[name], rel=1e-4)


def test_two_stages_with_a_file_between(pool, tmp_path):
    vectors = TaskVectors(**pool)
    first, between, second = (
        tmp_path / name for name in ("first.safetensors", "importance.json", "second.safetensors")
    )
    save_coefficients(Coefficients(vectors, filled(LayerWise(vectors))), first)
    found = write_importances(first, between)
    assert json.loads(between.read_text()) == found
    parametrization = filled(ImportanceChunkWise(vectors, importance=str(between), budget=1.5))
    assert 0 < sum(parametrization.allocation.values()) <= 6
    save_coefficients(Coefficients(vectors, parametrization), second)
    between.unlink()
    first.unlink()
    loaded = load_coefficients(second)
    assert loaded.parametrization.allocation == parametrization.allocation
    for name in vectors:
        assert torch.equal(
            loaded.parametrization(name, loaded.task_vectors[name]), parametrization(name, vectors[name])
        )


def test_the_table_says_what_is_frozen(pool):
    vectors = TaskVectors(**pool)
    importance = {"a": 0.625, "b": 0.25, "c": 0.0625, "d": 0.0625}
    lines = allocation_table(ImportanceChunkWise(vectors, importance=importance)).splitlines()
    assert lines[0] == "3 coefficients per expert for 2 tensors; 2 stay at the prior"
    assert [line.split() for line in lines[2:]] == [
        ["0.625000", "2", "a"], ["0.250000", "1", "b"], ["0.062500", "frozen", "c"], ["0.062500", "frozen", "d"],
    ]  # fmt: skip


def test_only_coefficients_of_tensors_have_importances(pool):
    class Other(Parametrization):
        initial = 0.0

        def forward(self, name, deltas):
            return deltas.dense()[0]

        def coefficients(self):
            return {}

        def values(self):
            return {}

    with pytest.raises(ConfigError, match="LayerWise the parametrization of the first stage"):
        importances(Coefficients(TaskVectors(**pool), Other()))
