"""A coefficient file and the models that it names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adamerge.artifacts.coefficients import Coefficients, save_coefficients
from adamerge.io.model_folder import Layout
from adamerge.parametrizations import LayerWise
from adamerge.parametrizations.constraints import Projection
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import Ties


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(3, 2, generator=generator), "b": torch.randn(2, generator=generator)}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "cars", "dtd")):
        save_file(weights(seed), root / f"{name}.safetensors")
    return {"base": str(root / "base.safetensors"),
            "experts": {name: str(root / f"{name}.safetensors") for name in ("cars", "dtd")}}  # fmt: skip


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory) -> Path:
    vectors = TaskVectors(**models, transforms=[Ties(0.5)])
    parametrization = LayerWise(vectors, constraint=Projection())
    parametrization.load_values({"a.weight": torch.tensor([[0.1], [0.2]]), "b": torch.tensor([[0.3], [0.4]])})
    path = tmp_path_factory.mktemp("saved") / "coefficients.safetensors"
    coefficients = Coefficients(vectors, parametrization, Layout("w.safetensors", {"c.json": "{}"}), step=5)
    save_coefficients(coefficients, path)
    return path
