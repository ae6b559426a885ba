"""Files of every version so far: coefficients, run folders and configurations that each wrote are read and gone on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from running import ROOT, adam_state, command, same_coefficients, without_pictures
from safetensors.torch import load_file

import adamerge
from adamerge.artifacts.coefficients import load_coefficients
from adamerge.artifacts.export import export
from adamerge.io.public_names import is_public

FIXTURES = Path(__file__).parent / "fixtures"
VERSIONS = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir() and path.name[0].isdigit())
FILES = [path.relative_to(FIXTURES).as_posix() for path in sorted(FIXTURES.glob("*/coefficients/*.safetensors"))]
MOVED = "--allow-resume-difference"  # fixtures were written by other versions of everything, on another machine


# runs of this version are what all other tests make
OF_TODAY = pytest.param(adamerge.__version__, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[*(one for one in VERSIONS if one != adamerge.__version__), OF_TODAY])
def written(request, tmp_path_factory):
    """A version's folder with the models beside it, as if both had always been there."""
    root = tmp_path_factory.mktemp(f"from-{request.param}")
    for name in (request.param, "fixture_models"):
        shutil.copytree(FIXTURES / name, root / name)
    for path in root.rglob("*"):
        if path.suffix in {".yaml", ".json"}:
            path.write_text(path.read_text().replace("{fixtures}", str(root)))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        patch.chdir(root)
        without_pictures(patch)
        yield root / request.param


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(str(FIXTURES))


def class_paths(content: object) -> list[str]:
    if isinstance(content, dict):
        own = [content["class_path"]] if isinstance(content.get("class_path"), str) else []
        return own + [name for value in content.values() for name in class_paths(value)]
    return [name for value in content for name in class_paths(value)] if isinstance(content, list) else []


def test_there_are_files_of_every_version_that_was():
    changes = (ROOT / "CHANGELOG.md").read_text()
    headings = [line.removeprefix("## ") for line in changes.splitlines() if line.startswith("## ")]
    were = {heading.split()[0] for heading in headings if "(unreleased)" not in heading}
    missing = sorted(were - set(VERSIONS) - {adamerge.__version__})
    assert not missing, f"{missing}: tests/fixtures/write.py writes them, run with that version"
    assert len(FILES) >= 10 * len(VERSIONS)
    size = sum(path.stat().st_size for path in FIXTURES.rglob("*") if path.is_file())
    assert size < 400_000 * (1 + len(VERSIONS)), "they are kept forever"


@pytest.mark.parametrize("name", FILES)
def test_a_coefficient_file_gives_the_same_merge(models, name, tmp_path):
    """The coefficients, and a weighted sum over every merged tensor, as the version that wrote it found them."""
    loaded = load_coefficients(FIXTURES / name)
    wanted = json.loads((FIXTURES / name).with_name("expected.json").read_text())[
        Path(name).stem.removesuffix("_coefficients")
    ]
    assert loaded.step == 7 and loaded.protocol == {"seed": 1}
    table = loaded.table()
    assert table.keys() == wanted["table"].keys()
    for group, rows in wanted["table"].items():
        assert table[group].keys() == rows.keys()
        for task, values in rows.items():
            assert table[group][task] == pytest.approx(values, abs=1e-6)
    out = export(loaded, tmp_path / "merged", task=None)
    merged = load_file(out / "model.safetensors")
    assert merged.keys() == wanted["sums"].keys()
    for key, tensor in merged.items():
        weights = torch.arange(1, 1 + tensor.numel(), dtype=torch.float64).view(tensor.shape)
        # rounding of fp32: a few units in the last place of each element, all of one sign at the worst
        bound = 8 * 2.0**-24 * float((weights * (tensor.double().abs() + 1)).sum())
        assert float((tensor.double() * weights).sum()) == pytest.approx(wanted["sums"][key], abs=bound), key


@pytest.mark.parametrize("name", FILES)
def test_a_coefficient_file_is_shown(models, name, capfd):
    outcome = command(capfd, "inspect", FIXTURES / name)
    assert outcome.code == 0 and f"adamerge {name.partition('/')[0]}" in " ".join(outcome.out.split())


def test_a_finished_run_is_shown_scored_exported_and_resumes_to_itself(written, capfd, tmp_path):
    for run in (written / "runs" / "plain", written / "runs" / "staged"):
        outcome = command(capfd, "inspect", run)
        assert outcome.code == 0 and "finished after" in outcome.out
        outcome = command(capfd, "test", run)
        assert outcome.code == 0, outcome.err
        assert set(json.loads((run / "summary.json").read_text())["test"]["per_task"]) == {"one", "two"}
        outcome = command(capfd, "export", run / "coefficients.safetensors", tmp_path / run.name)
        assert outcome.code == 0 and (tmp_path / run.name / "model.safetensors").is_file(), outcome.err
    before = (run / "coefficients.safetensors").read_bytes()
    outcome = command(capfd, "fit", "--resume", run, MOVED)
    assert outcome.code == 0 and (run / "coefficients.safetensors").read_bytes() == before, outcome.err


def test_an_interrupted_run_goes_on(written, capfd):
    """From its checkpoint, to the end."""
    run = written / "runs" / "stopped"
    assert adam_state(run)["step"] == 3
    outcome = command(capfd, "fit", "--resume", run, MOVED)
    assert outcome.code == 0, outcome.err
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("finished", 6) and adam_state(run)["step"] == 6
    assert not same_coefficients(run, written / "runs" / "plain")


def test_its_coefficients_and_masks_are_a_start(written, capfd):
    configs, start = written / "configs", written / "runs" / "stopped" / "coefficients.safetensors"
    words = ["fit", "--config", configs / "pool.yaml", "--config", configs / "plain.yaml", "--runs=new", "--name=x"]
    outcome = command(capfd, *words, "--id=warm", f"--model.init_from={start}", "--trainer.max_steps=1")
    assert outcome.code == 0, outcome.err
    words[4] = configs / "staged" / "2_coefficients.yaml"
    mask = f"--model.parametrization.mask_from={written / 'runs' / 'staged' / '1_mask' / 'coefficients.safetensors'}"
    outcome = command(capfd, *words, "--id=masked", mask, "--trainer.max_steps=1")
    assert outcome.code == 0, outcome.err
    # configurations of that version, and what is written of them today
    for name in ("warm", "masked"):
        text = Path(f"new/x/{name}/config.yaml").read_text()
        ours = [path for path in class_paths(yaml.safe_load(text)) if path.startswith("adamerge")]
        assert len(ours) >= 8 and all(map(is_public, ours)), ours


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("0.[2-9]*/**/*.yaml")), ids=lambda path: path.stem)
def test_since_then_files_name_no_module(path):
    text = path.read_text().replace("{fixtures}", "/somewhere")
    ours = [name for name in class_paths(yaml.safe_load(text)) if name.startswith("adamerge")]
    assert all(map(is_public, ours)), ours
    if path.name == "config.yaml":
        assert text.startswith(f"# adamerge {path.relative_to(FIXTURES).parts[0]}\n")
