"""The coefficients that people see: each where there are few, mean and spread where there are many, in every display."""

import math
import re

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from adamerge.artifacts.coefficient_table import MOST, Moments, coefficient_table, moments_of, summarised, text_of
from adamerge.artifacts.coefficients import Coefficients, save_coefficients
from adamerge.artifacts.heatmap import draw_heatmap
from adamerge.artifacts.model_card import card
from adamerge.parametrizations import ChunkWise, Concrete, ElementWise, LayerWise, RowColumnWise
from adamerge.runs.inspection import describe_path
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.wandb_run import _rows

SIDE = 80  # of a matrix: 6,400 elements of each of two experts


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    root = tmp_path_factory.mktemp("many")
    torch.manual_seed(0)
    base = {"blocks.0.weight": torch.randn(SIDE, SIDE), "blocks.0.bias": torch.randn(SIDE)}
    save_file(base, root / "base.safetensors")
    for task in ("one", "two"):
        save_file({name: own + torch.randn(own.shape) for name, own in base.items()}, root / f"{task}.safetensors")
    return TaskVectors(root / "base.safetensors", {task: root / f"{task}.safetensors" for task in ("one", "two")})


def randomised(parametrization):
    values = {group: 1 + 0.25 * torch.randn(own.shape) for group, own in parametrization.values().items()}
    parametrization.load_values(values)
    return parametrization


def test_ten_thousand_numbers_are_the_most_that_are_shown():
    assert not summarised({"a": torch.zeros(2, MOST // 4), "b": torch.zeros(2, MOST // 4)})
    assert summarised({"a": torch.zeros(2, MOST // 4), "b": torch.zeros(2, MOST // 4 + 1)})


def test_few_are_shown_one_by_one(vectors):
    values = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    assert coefficient_table(LayerWise, values, ("one", "two")) == {"a": {"one": [1.0, 2.0], "two": [3.0, 4.0]}}
    assert moments_of([1.0, 3.0]) == (2.0, 1.0) and text_of([1.0, 3.0]) == "1.0000, 3.0000"


@pytest.mark.parametrize(
    "kind", [ElementWise, lambda v: ChunkWise(v, chunks=SIDE * SIDE), lambda v: Concrete(v, ElementWise)]
)
def test_many_are_mean_and_spread_by_tensor_and_expert(vectors, kind):
    parametrization = randomised(kind(vectors))
    table = Coefficients(vectors, parametrization).table()
    for group, own in parametrization.values().items():
        for row, task in zip(own.double(), vectors.experts, strict=True):
            cell = table[group][task]
            assert isinstance(cell, Moments) and cell == pytest.approx(
                (float(row.mean()), float(row.std(correction=0)))
            )


def test_rows_and_columns_are_shown_as_what_they_multiply_by(vectors, monkeypatch):
    monkeypatch.setattr("adamerge.artifacts.coefficient_table.MOST", 10)
    parametrization = randomised(RowColumnWise(vectors))
    values, table = parametrization.values(), Coefficients(vectors, parametrization).table()
    assert set(table) == {"blocks.0.weight", "blocks.0.bias"}
    both = values["blocks.0.weight/rows"][1].unsqueeze(1) + values["blocks.0.weight/columns"][1]
    assert table["blocks.0.weight"]["two"] == pytest.approx(
        (float(both.mean()), float(both.std(correction=0))), abs=1e-5
    )


def test_no_display_has_all_numbers(vectors, tmp_path, capfd, monkeypatch):
    """Card, wandb's rows, picture and ``inspect``: a line a tensor and expert; the file has all."""
    monkeypatch.setenv("COLUMNS", "160")
    parametrization = randomised(ElementWise(vectors))
    coefficients = Coefficients(vectors, parametrization)
    table = coefficients.table()
    columns, rows = _rows(table)
    assert columns == ["group", "expert", "mean", "spread"] and len(rows) == 4
    text = card(coefficients)
    assert len(text) < 2000 and text.count("±") == 4
    save_coefficients(coefficients, tmp_path / "coefficients.safetensors")
    assert (tmp_path / "coefficients.safetensors").stat().st_size > 4 * 2 * SIDE * SIDE
    describe_path(str(tmp_path / "coefficients.safetensors"))
    shown = capfd.readouterr().out
    assert len(shown) < 3000 and shown.count("±") == 5 and "mean ± spread" in shown
    mean, spread = table["blocks.0.bias"]["one"]
    assert re.search(rf"{mean:.4f} ± {spread:.4f}", shown)
    draw_heatmap(table, tmp_path / "heatmap.png")
    with Image.open(tmp_path / "heatmap.png") as picture:
        assert min(picture.size) > 100


def test_inspect_shows_rows_and_columns_as_one(vectors, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("adamerge.artifacts.coefficient_table.MOST", 10)
    monkeypatch.setenv("COLUMNS", "160")
    coefficients = Coefficients(vectors, randomised(RowColumnWise(vectors)))
    save_coefficients(coefficients, tmp_path / "coefficients.safetensors")
    describe_path(str(tmp_path / "coefficients.safetensors"))
    shown = capfd.readouterr().out
    cell = coefficients.table()["blocks.0.weight"]["one"]
    assert str(cell) in shown and "/rows" not in shown and math.isfinite(cell.mean)
