"""Inspection: what is printed of coefficient files, runs and models, and that nothing but headers is read."""

import json
from pathlib import Path

import pytest
import torch
from running import METHODS, command, fit_words, pool_config, without_pictures, write_yaml
from safetensors.torch import save_file

from adamerge.artifacts.coefficients import Coefficients, save_coefficients
from adamerge.parametrizations import LayerWise
from adamerge.parametrizations.constraints import Clamp, Free, Sigmoid
from adamerge.runs.fit import fit
from adamerge.task_vectors.task_vectors import TaskVectors


@pytest.fixture
def run(pool, image_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    without_pictures(monkeypatch)
    file = write_yaml(tmp_path / "tiny.yaml", pool_config(pool, image_folders))
    return fit(fit_words(file, "--id=a", method=METHODS / "adamerging_plusplus_layer_wise.yaml"))


def test_coefficients(run, capfd):
    outcome = command(capfd, "inspect", run / "coefficients.safetensors")
    assert outcome.code == 0
    text = " ".join(outcome.out.split())
    for words in (
        "after 3 steps",
        "LayerWise",
        "Ties",
        "Projection",
        "colours",
        "shapes",
        "visual.proj",
        "transductive",
    ):
        assert words in text, words


def test_a_run_says_how_it_ended(run, capfd):
    outcome = command(capfd, "inspect", run)
    assert outcome.code == 0 and "finished after 3 steps" in " ".join(outcome.out.split())
    (run / "summary.json").write_text(json.dumps({"status": "diverged", "step": 2}))
    assert "diverged after 2 steps" in " ".join(command(capfd, "inspect", run).out.split())


def test_a_run_that_has_no_coefficients_yet(run, capfd):
    (run / "coefficients.safetensors").unlink()
    outcome = command(capfd, "inspect", run)
    assert outcome.code in (0, 3) and (
        outcome.code == 0 or "coefficients" in outcome.error or str(run) in outcome.error
    )


def test_models(pool, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    for path in (pool["base"], pool["experts"]["colours"], Path(pool["base"]) / "open_clip_model.safetensors"):
        outcome = command(capfd, "inspect", path)
        assert outcome.code == 0 and "visual.proj" in outcome.out and "(32, 16)" in outcome.out
        assert "float32" in outcome.out and "tensors" in outcome.out and "elements" in outcome.out


def test_weights_are_not_read(run, pool, capfd, monkeypatch):
    def refuse(self, *_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr("adamerge.checkpoints.checkpoint.SafetensorsCheckpoint.__getitem__", refuse)
    monkeypatch.setattr("adamerge.checkpoints.checkpoint.Checkpoint._pass", refuse)
    assert command(capfd, "inspect", run).code == 0
    assert command(capfd, "inspect", pool["base"]).code == 0


def test_what_is_nothing_of_these(tmp_path, capfd):
    (tmp_path / "x_coefficients.safetensors").write_bytes(b"\x00" * 40)
    for path in (tmp_path / "gone", tmp_path, tmp_path / "x_coefficients.safetensors"):
        outcome = command(capfd, "inspect", path)
        assert outcome.code == 3 and str(path.name) in outcome.error
        assert outcome.err.splitlines()[0] == outcome.error


def test_names_with_brackets_are_not_markup(run, tmp_path, capfd):
    """Rich reads [red] as a colour: a folder of that name must be printed as it is."""
    strange = tmp_path / "[red]x"
    strange.mkdir()
    for name in ("coefficients.safetensors", "summary.json"):
        (strange / name).write_bytes((run / name).read_bytes())
    outcome = command(capfd, "inspect", strange)
    assert outcome.code == 0 and "[red]x" in outcome.out


def a_file(path, constraint, names=("a.weight", "a.bias"), held=None):
    """Coefficients of a toy with raw values of 6.36 for its first expert."""
    experts = {task: {name: torch.ones(3) for name in names} for task in ("one", "two")}
    vectors = TaskVectors({name: torch.zeros(3) for name in names}, experts)
    made = LayerWise(vectors, init=0.5, constraint=constraint)
    with torch.no_grad():
        made.w[0] = 6.36
    save_coefficients(Coefficients(vectors, made, protocol={"held": held} if held else {}), path)
    return path


def test_coefficients_are_shown_and_not_what_a_constraint_makes_them_of(tmp_path, capfd):
    outcome = command(capfd, "inspect", a_file(tmp_path / "coefficients.safetensors", Sigmoid()))
    assert outcome.code == 0 and "0.9983 (6.3600)" in outcome.out, "1 / (1 + exp(-6.36)) = 0.99827"
    assert "0.5000 (0.0000)" in outcome.out
    outcome = command(capfd, "inspect", a_file(tmp_path / "coefficients.safetensors", Clamp()))
    assert "1.0000 (6.3600)" in outcome.out and "0.5000 (0.5000)" in outcome.out
    outcome = command(capfd, "inspect", a_file(tmp_path / "coefficients.safetensors", Free()))
    assert "6.3600" in outcome.out and "(6.3600)" not in outcome.out


def test_what_was_held_is_said(tmp_path, capfd):
    file = a_file(tmp_path / "coefficients.safetensors", Free(), held={"a.bias": {"two": [0]}})
    lines = command(capfd, "inspect", file).out.splitlines()
    (line,) = [line for line in lines if "a.bias" in line]
    assert line.count("held") == 1 and "0.5000 held" in line
    assert not any("held" in line for line in lines if "a.weight" in line)


LONG = [
    f"model.{'encoder.' * 12}layers.{n}.self_attention.output_projection.{k}"
    for n in (1, 12)
    for k in ("weight", "bias")
]


@pytest.mark.parametrize("columns", [None, "80", "40"])
def test_names_are_never_cut(columns, tmp_path, capfd, monkeypatch):
    """Into a pipe they are whole; in a terminal they go on in the next line."""
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setattr("rich.console.Console.is_terminal", True)
    file = a_file(tmp_path / "coefficients.safetensors", Sigmoid(), names=LONG)
    out = command(capfd, "inspect", file).out
    assert "…" not in out.split("coefficients (raw")[1]
    if columns is None:
        assert all(name in out for name in LONG)
        return
    # the first column, put together again
    column = "".join(line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│"))
    assert all(name in column for name in LONG)
    save_file({name: torch.zeros(2) for name in LONG}, tmp_path / "model.safetensors")
    out = command(capfd, "inspect", tmp_path / "model.safetensors").out
    column = "".join(line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│"))
    assert all(name in column for name in LONG) and "float32" in out
