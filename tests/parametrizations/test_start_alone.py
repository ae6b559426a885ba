"""The start alone: base and start to the bit, and no expert is read."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from adamerge.artifacts.coefficients import Coefficients, load_coefficients, save_coefficients
from adamerge.artifacts.export import merged_tensors
from adamerge.deltas.streamed import StreamedDeltas
from adamerge.parametrizations import StartAlone
from adamerge.solvers import WeightedSum
from adamerge.solvers.solving import write_task_vectors
from adamerge.task_vectors.task_vectors import TaskVectors


@pytest.fixture
def models(tmp_path):
    generator = torch.Generator().manual_seed(3)
    base = {"a": torch.randn(3, 4, generator=generator), "b": torch.randn(5, generator=generator)}
    save_file(base, tmp_path / "base.safetensors")
    for task in "xy":
        moved = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        save_file(moved, tmp_path / f"{task}.safetensors")
    experts = {task: str(tmp_path / f"{task}.safetensors") for task in "xy"}
    return {"base": str(tmp_path / "base.safetensors"), "experts": experts}


@pytest.mark.parametrize("begun", [False, True])
def test_base_and_start_are_merged_as_they_are(begun, models, tmp_path, monkeypatch):
    start = tmp_path / "merged.safetensors"
    write_task_vectors(start, WeightedSum(0.4), TaskVectors(**models), recipe={})
    vectors = TaskVectors(**models, start=str(start) if begun else None)
    save_coefficients(Coefficients(vectors, StartAlone(vectors)), tmp_path / "c.safetensors")
    loaded = load_coefficients(tmp_path / "c.safetensors")
    assert loaded.table() == {} and loaded.task_vectors.experts == ("x", "y")

    def refuse(*_):
        raise AssertionError("an expert was read")

    monkeypatch.setattr(StreamedDeltas, "row_batches", refuse)
    base, deltas = load_file(models["base"]), load_file(start)
    for name, value in merged_tensors(loaded, torch.float32):
        assert torch.equal(value, base[name] + deltas[name] if begun else base[name]), name
