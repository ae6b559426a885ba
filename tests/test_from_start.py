"""Rows and columns learned from a solver's start, through the command line: trained is exported, also when a run moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from running import command, pool_config, without_pictures, write_yaml
from safetensors.torch import load_file

from adamerge import OpenClipClassifier
from adamerge.artifacts.coefficients import load_coefficients
from adamerge.artifacts.export import export_from
from adamerge.io.coefficient_file import read_coefficients
from adamerge.merging.merged_model import MergedModel
from adamerge.task_vectors.storage import Disk, Resident

SOLVE = {"model": {"solver": {"class_path": "adamerge.Wudi", "init_args": {"ridge": 0.5, "vector_scale": 0.4}}}}
KINDS = {
    "RowColumnWise": {},
    "ElementWise": {"transforms": [{"class_path": "adamerge.RootSumSquare"}]},
}


@pytest.fixture(scope="module", params=KINDS)
def run(request, pool, image_folders, tmp_path_factory):
    """A run of two stages, as anyone would start it, which then moved."""
    kind, root = request.param, tmp_path_factory.mktemp("start")
    patch = pytest.MonkeyPatch()
    patch.chdir(root)
    without_pictures(patch)
    pool_file = write_yaml(root / "pools" / "tiny.yaml", pool_config(pool, image_folders))
    folder = root / "methods" / "rows"
    write_yaml(folder / "1_solve.yaml", SOLVE)
    learned = {
        "task_vectors": {"start": "{task_vectors}", **KINDS[kind]},
        "parametrization": {"class_path": f"adamerge.{kind}", "init_args": {"init": 0.0}},
        "objective": {"class_path": "adamerge.LogitAlignment"},
        "search": {"class_path": "adamerge.Descent", "init_args": {"lr": 0.05}},
    }
    write_yaml(folder / "2_learn.yaml", {"model": learned, "data": {"batch_size": 2}, "trainer": {"max_steps": 2}})
    yield kind, pool, pool_file, folder, root
    patch.undo()


@pytest.mark.slow
def test_what_is_learned_from_a_start_is_what_is_exported(run, capfd):
    kind, pool, pool_file, folder, root = run
    checked = command(capfd, "check", pool_file, folder)
    assert checked.code == 0, checked.err[-3000:]
    outcome = command(capfd, "fit", pool_file, folder, "--id=a", "--trainer.accelerator=cpu")
    assert outcome.code == 0, outcome.err[-3000:]
    there = Path("runs/tiny-rows/a").rename(root / "moved")
    metadata, sections = read_coefficients(there)
    assert metadata["start"]["source"] == "run:1_solve/task_vectors/merged.safetensors"
    assert all(value.abs().max() > 0 for value in sections["w"].values()), "something was learned everywhere"
    exported = load_file(export_from(there, root / "merged") / "open_clip_model.safetensors")
    coefficients = load_coefficients(there)
    for storage in (Resident(), Disk()):
        merged = MergedModel(
            OpenClipClassifier(pool["base"]), coefficients.task_vectors, coefficients.parametrization, storage
        )
        with torch.no_grad():
            merged.merge()
        for name in coefficients.task_vectors:
            assert torch.equal(exported[name], merged.backbone.tensors()[name]), name
    # without the learned numbers, it is base and start
    zeros = {group: torch.zeros_like(value) for group, value in coefficients.parametrization.values().items()}
    coefficients.parametrization.load_values(zeros)
    with torch.no_grad():
        merged.merge()
    start = load_file(there / "1_solve/task_vectors/merged.safetensors")
    for name, delta in start.items():
        assert torch.equal(merged.backbone.tensors()[name], coefficients.task_vectors.base[name] + delta), name
    shown = command(capfd, "inspect", there)
    assert shown.code == 0 and "start: run:1_solve" in " ".join(shown.out.split()) and kind in shown.out
