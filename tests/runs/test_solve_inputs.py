"""A run with a solver that sees inputs: what it writes and tells, what is refused, and that labels change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from running import command, pool_config, write_yaml
from safetensors.torch import load_file

from adamerge.io.coefficient_file import read_coefficients
from adamerge.runs.finished_runs import UNLABELLED, section_of
from adamerge.runs.stages import fit
from adamerge.solvers import Wudi
from adamerge.task_vectors.task_vectors import TaskVectors

FILE = Path("task_vectors/merged.safetensors")
SOLVER = {"class_path": "adamerge.LeastSquares", "init_args": {"ridge": 0.2, "samples": 5}}


@pytest.fixture
def method(tmp_path):
    return write_yaml(tmp_path / "methods" / "squares.yaml", {"model": {"solver": SOLVER}})


def test_a_run_says_what_it_has_seen_and_goes_on_where_it_was(pool, pool_file, method, capfd, monkeypatch):
    outcome = command(capfd, "fit", pool_file, method, "--id=a")
    assert outcome.code == 0, outcome.err[-3000:]
    run = Path("runs/tiny-squares/a")
    told = json.loads((run / "summary.json").read_text())
    metadata, _ = read_coefficients(run)
    tasks = list(pool["experts"])
    for protocol in (told["protocol"], metadata["protocol"]):
        assert protocol["solver_samples"] == dict.fromkeys(tasks, 5)
        assert protocol["calibration_split"] == "calibration, labels never read"
    assert section_of(run) == UNLABELLED and told["solver"]["init_args"]["samples"] == 5
    maps = 4 * sum(name.endswith("ln_1.weight") for name in TaskVectors(**pool)) + 1
    passes = maps * 5 * len(tasks)
    assert told["forward_passes"] == {"merged": passes, "experts": passes, "validation": 0}
    written, vectors = load_file(run / FILE), TaskVectors(**pool)
    for name in vectors:
        same = torch.equal(written[name], Wudi(0.3, 0.4).solve(name, vectors))
        is_map = any(word in name for word in ("attn.", "mlp.", "visual.proj"))
        assert same != is_map, name
    shown = command(capfd, "inspect", run / FILE)
    assert shown.code == 0 and "labels never read" in " ".join(shown.out.split())

    solve_maps, count = adamerge_least_squares().solve_maps, []

    def interrupted(self, maps, toward):
        if len(count) == 3:
            raise KeyboardInterrupt
        count.append(maps.names)
        return solve_maps(self, maps, toward)

    monkeypatch.setattr(adamerge_least_squares(), "solve_maps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit([str(pool_file), str(method), "--id=cut"])
    monkeypatch.setattr(adamerge_least_squares(), "solve_maps", solve_maps)
    cut = fit([], resume=Path("runs/tiny-squares/cut"))
    assert (cut / FILE).read_bytes() == (run / FILE).read_bytes()


def adamerge_least_squares():
    from adamerge.solvers import LeastSquares

    return LeastSquares


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        ({}, {"labelled": True}, "LeastSquares must not see labels"),
        ({"copy": "adamerge.BlockCopy"}, {}, "LeastSquares runs whole models one after the other"),
        (
            {"solver": {"class_path": "adamerge.Scaled", "init_args": {"solver": SOLVER, "scale": 0.5}}},
            {},
            "sees inputs",
        ),
    ],
)
def test_check_refuses_what_fit_refuses(model, data, words, pool_file, tmp_path, capfd):
    content = {"model": {"solver": SOLVER, **model}, "data": {"init_args": data}}
    file = write_yaml(tmp_path / "methods" / "odd.yaml", content)
    for verb in ("check", "fit"):
        outcome = command(capfd, verb, pool_file, file)
        assert outcome.code == 2 and words in outcome.error, outcome.err[-2000:]
    assert not Path("runs").exists()


def test_without_data_it_is_refused_and_check_counts_inputs(pool, image_folders, pool_file, method, tmp_path, capfd):
    bare = {key: value for key, value in pool_config(pool, image_folders).items() if key != "data"}
    outcome = command(capfd, "check", write_yaml(tmp_path / "bare.yaml", bare), method)
    assert outcome.code == 2 and "model.solver=LeastSquares needs data" in outcome.error
    outcome = command(capfd, "check", pool_file, method)
    said = " ".join(outcome.out.split())
    assert outcome.code == 0 and "and sees unlabelled inputs" in said and "calibration" in said
