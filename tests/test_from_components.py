"""Components learned through the command line: trained is exported, by any threads, after a move and after a cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import ROOT, command, pool_config, without_pictures, write_yaml
from safetensors.torch import load_file

from adamerge import OpenClipClassifier
from adamerge.artifacts.coefficients import load_coefficients
from adamerge.io.coefficient_file import read_coefficients
from adamerge.merging.merged_model import MergedModel
from adamerge.runs.stages import fit
from adamerge.task_vectors.storage import Disk, Resident

FILE = "1_components/task_vectors/components.safetensors"
KINDS = {
    "ComponentWise": {"init": 0.3},
    "RankMask": {"inner": {"class_path": "adamerge.LayerWise", "init_args": {"init": 0.3}}, "keep": 0.5},
}


@pytest.fixture(scope="module", params=KINDS)
def made(request, pool, image_folders, tmp_path_factory):
    """A method of two stages on a pool, and a run of it."""
    root = tmp_path_factory.mktemp("components")
    patch = pytest.MonkeyPatch()
    patch.chdir(root)
    without_pictures(patch)
    pool_file = write_yaml(root / "pools" / "tiny.yaml", pool_config(pool, image_folders))
    folder = root / "methods" / "parts"
    write_yaml(folder / "1_components.yaml", {"model": {"solver": {"class_path": "adamerge.Components"}}})
    learned = {
        "task_vectors": {"components": "{task_vectors}"},
        "parametrization": {"class_path": f"adamerge.{request.param}", "init_args": KINDS[request.param]},
        "objective": {"class_path": "adamerge.LogitAlignment"},
        "search": {"class_path": "adamerge.Descent", "init_args": {"lr": 0.05}},
    }
    write_yaml(folder / "2_learn.yaml", {"model": learned, "data": {"batch_size": 2}, "trainer": {"max_steps": 4}})
    words = [str(pool_file), str(folder), "--trainer.accelerator=cpu"]
    yield request.param, pool, words, fit([*words, "--id=a"]).rename(root / "moved")
    patch.undo()


@pytest.mark.slow
def test_what_is_learned_is_what_is_exported(made, capfd):
    kind, pool, words, there = made
    checked = command(capfd, "check", *words)
    said = " ".join(checked.out.split())
    assert checked.code == 0 and "Components writes components of each expert" in said, checked.err[-3000:]
    metadata, sections = read_coefficients(there)
    assert metadata["components"]["source"] == f"run:{FILE}" and metadata["rows"] == [*pool["experts"]]
    assert metadata["experts"].keys() == pool["experts"].keys(), "heads and fingerprints stay the experts' own"
    assert sections["w"] and (kind == "ComponentWise") != bool(sections["mask"])
    coefficients = load_coefficients(there)
    exported = {}
    for threads in ("1", "2"):
        target = there.parent / f"merged-{threads}"
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONPATH": str(ROOT)}
        run = [sys.executable, "-m", "adamerge", "export", str(there), str(target)]
        subprocess.run(run, check=True, env=environment, capture_output=True, timeout=300)
        exported[threads] = load_file(target / "open_clip_model.safetensors")
    assert all(torch.equal(value, exported["2"][name]) for name, value in exported["1"].items())
    for storage in (Resident(), Disk()):
        merged = MergedModel(
            OpenClipClassifier(pool["base"]), coefficients.task_vectors, coefficients.parametrization, storage
        )
        with torch.no_grad():
            merged.merge()
        for name in coefficients.task_vectors:
            assert torch.equal(exported["1"][name], merged.backbone.tensors()[name]), name
    shown = command(capfd, "inspect", there)
    assert shown.code == 0 and f"components: run:{FILE}" in " ".join(shown.out.split()) and kind in shown.out
    assert "components by adamerge.Components" in (there.parent / "merged-1" / "README.md").read_text()
    held = command(capfd, "inspect", there / FILE)
    assert held.code == 0 and "adamerge.Components" in held.out


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_to_the_same_numbers(made, capfd):
    _, _, words, there = made
    cut = fit([*words, "--id=b", "--2.trainer.max_steps=2"])
    scored = command(capfd, "test", cut)
    assert scored.code == 0 and json.loads((cut / "summary.json").read_text())["test"]["average"] > 0
    whole = fit(["--2.trainer.max_steps=4"], resume=cut)
    wanted, found = (read_coefficients(run)[1] for run in (there, whole))
    for section in ("w", "mask"):
        assert wanted[section].keys() == found[section].keys()
        assert all(torch.equal(value, found[section][name]) for name, value in wanted[section].items())


@pytest.mark.slow
def test_the_first_stage_alone_is_the_base(made, capfd):
    _, pool, _, there = made
    assert command(capfd, "export", there / "1_components", there.parent / "first").code == 0
    base = load_file(Path(pool["base"]) / "open_clip_model.safetensors")
    found = load_file(there.parent / "first" / "open_clip_model.safetensors")
    assert all(torch.equal(value, base[name]) for name, value in found.items())
