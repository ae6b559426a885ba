"""Versions: one number in one place, in every file that is written; files of a later version are refused by name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import safetensors.torch
import torch
from running import command

import adamerge
from adamerge.artifacts.coefficients import Coefficients, load_coefficients, save_coefficients
from adamerge.errors import CheckpointError, CoefficientsError, ConfigError
from adamerge.io.coefficient_file import METADATA_KEY, digest_of
from adamerge.io.versions import WRITTEN_BY, refuse_later, version_of
from adamerge.parametrizations import LayerWise
from adamerge.runs.config_files import read_config
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.run_checkpoints import WRITER, AtomicCheckpoints

ROOT = Path(__file__).parents[2]
LATER = "was written by adamerge 999.1.0, and this is adamerge "


def test_the_number_stands_in_one_place():
    """In the package, so that a source checkout tells its own and not what is installed elsewhere."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"] and project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "adamerge.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", adamerge.__version__)
    assert f"## {adamerge.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    code = "import sys; from adamerge.cli import main; main(['--version']); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.split() == [adamerge.__version__, "False"]


@pytest.mark.parametrize("version", ["0.1.0", "0.0.9", adamerge.__version__, None, 3, "", "x", "1"])
def test_earlier_versions_and_none_are_read(version):
    refuse_later(version, "file", ConfigError)


def test_the_last_number_does_not_count(monkeypatch):
    monkeypatch.setattr(adamerge, "__version__", "0.9.1")
    refuse_later("0.9.7", "file", ConfigError)
    refuse_later("0.9", "file", ConfigError)
    for later in ("0.10.0", "1.0.0", "0.10.0.dev1"):
        with pytest.raises(ConfigError, match=rf"^file was written by adamerge {later}, and this is adamerge 0\.9\.1"):
            refuse_later(later, "file", ConfigError)


def test_a_configuration_says_it_in_its_first_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("# adamerge 999.1.0\nmodel: {}\n")
    assert version_of(path.read_text()) == "999.1.0" and version_of(f"# {WRITTEN_BY}\n") == adamerge.__version__
    with pytest.raises(ConfigError, match=rf"config\.yaml {LATER}") as found:
        read_config(path)
    assert "pip install 'adamerge>=999.1.0'" in found.value.todo
    path.write_text("# adamerge is a tool\nmodel: {}\n")
    assert version_of(path.read_text()) is None and read_config(path) == {"model": {}}


def test_a_checkpoint_says_it(tmp_path):
    files, path = AtomicCheckpoints(), tmp_path / "last.ckpt"
    files.save_checkpoint({"global_step": 3}, path)
    assert files.load_checkpoint(path) == {"global_step": 3, WRITER: adamerge.__version__}
    torch.save({"global_step": 3, WRITER: "999.1.0"}, path)
    with pytest.raises(CheckpointError, match=LATER):
        files.load_checkpoint(path)


def test_a_coefficient_file_of_a_later_version_is_refused_first(tmp_path, capfd):
    """Whatever else is in it that this version does not know."""
    base, expert = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    for name, tensors in (("base", base), ("one", expert)):
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
    vectors = TaskVectors(tmp_path / "base.safetensors", {"one": tmp_path / "one.safetensors"})
    path = tmp_path / "coefficients.safetensors"
    save_coefficients(Coefficients(vectors, LayerWise(vectors)), path)
    with safetensors.safe_open(path, "pt") as file:
        metadata, values = (
            json.loads(file.metadata()[METADATA_KEY]),
            {name: file.get_tensor(name) for name in sorted(file.keys())},
        )
    assert metadata["version"] == adamerge.__version__
    metadata |= {"version": "999.1.0", "format": 77, "something": "new"}
    metadata["digest"] = digest_of(metadata, values)
    safetensors.torch.save_file(values, path, {METADATA_KEY: json.dumps(metadata)})
    with pytest.raises(CoefficientsError, match=LATER):
        load_coefficients(path)
    for words in (("inspect", path), ("export", path, tmp_path / "out")):
        outcome = command(capfd, *words)
        assert outcome.code == 3 and LATER in outcome.error and "pip install" in outcome.err
