"""Inspection: what is printed of coefficient files, runs and models, and that nothing but headers is read."""

import json
from pathlib import Path

import pytest
from running import METHODS, command, fit_words, pool_config, without_pictures, write_yaml

from adamerge.runs import fit


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

    monkeypatch.setattr("adamerge.checkpoint.SafetensorsCheckpoint.__getitem__", refuse)
    monkeypatch.setattr("adamerge.checkpoint.Checkpoint._pass", refuse)
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
