"""Moved runs: every verb takes a run's folder wherever it is now, and touches nothing of what has taken its place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from running import METHODS, QUICK, command, same_coefficients, write_yaml
from safetensors.torch import load_file

import adamerge.runs.fit
from adamerge.runs.stages import fit
from adamerge.training import MergingModule

LAYER_WISE = {"class_path": "adamerge.LayerWise", "init_args": {"init": 0.3}}
RANKS = {"class_path": "adamerge.RankMask", "init_args": {"inner": LAYER_WISE, "keep": 0.5}}
WUDI = {"solver": {"class_path": "adamerge.Wudi", "init_args": {"ridge": 0.5, "vector_scale": 0.4}}}
COMPONENTS = {"solver": {"class_path": "adamerge.Components"}}
START, EXPERT = {"start": "{task_vectors}"}, {"experts": {"colours": "{task_vectors}"}}
LEARNED = {
    "objective": {"class_path": "adamerge.LogitAlignment"},
    "search": {"class_path": "adamerge.Descent", "init_args": {"lr": 0.05}},
}
MODELS = {
    "start": {"1_solve": WUDI, "2_sum": {"task_vectors": START, "parametrization": LAYER_WISE}},
    "components": {
        "1_components": COMPONENTS,
        "2_mask": {"task_vectors": {"components": "{task_vectors}"}, "parametrization": RANKS},
    },
    "expert": {"1_solve": WUDI, "2_sum": {"task_vectors": EXPERT, "parametrization": LAYER_WISE}},
    "learned": {
        "1_solve": WUDI,
        "2_learn": {"task_vectors": START, "parametrization": LAYER_WISE, **LEARNED},
        "3_on": {"task_vectors": START, "parametrization": LAYER_WISE, **LEARNED, "init_from": "{previous}"},
    },
}
"""Stages of a method; ``model`` of each."""
OURS = {"mask": "concrete_adamerging_layer_wise", "ranks": "adarank", "chunks": "expert_merging_plusplus"}
"""Methods of this repository."""
INSIDE = {
    "start": ["1_solve/task_vectors/merged.safetensors"],
    "components": ["1_components/task_vectors/components.safetensors"],
    "expert": ["1_solve/task_vectors/merged.safetensors"],
    "learned": ["1_solve/task_vectors/merged.safetensors", "2_learn/coefficients.safetensors"],
    "mask": ["1_mask/coefficients.safetensors"],
    "ranks": ["1_components/task_vectors/components.safetensors"],
    "chunks": ["1_expert_merging/importance.json", "teachers"],
}
"""What the last stage's configuration names in the run's folder."""


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("start", "learned", "mask", "ranks", "chunks")]


@pytest.fixture
def words(kind, pool_file, tmp_path):
    """The command line of a fit by a method whose last stage reads files of earlier ones."""
    method = METHODS / OURS[kind] if kind in OURS else tmp_path / "methods" / kind
    for name, model in MODELS.get(kind, {}).items():
        write_yaml(method / f"{name}.yaml", {"model": model})
    return [str(pool_file), str(method), *QUICK, "--trainer.max_steps=3", "--name=n", "--trainer.accelerator=cpu"]


def moved(run: Path) -> Path:
    """Moves a run, and puts files of the same names in its place that nobody can read."""
    there = Path("elsewhere/deep").absolute() / run.name
    there.parent.mkdir(parents=True)
    shutil.move(run, there)
    for path in contents(there):
        decoy = run / path.relative_to(there)
        decoy.parent.mkdir(parents=True, exist_ok=True)
        decoy.write_bytes(b"another run's")
    return there


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stages_of(run: Path) -> list[str]:
    return json.loads((run / "stages.json").read_text())["stages"]


def texts(content: object) -> list[str]:
    if isinstance(content, dict):
        content = list(content.values())
    return [text for one in content for text in texts(one)] if isinstance(content, list) else [str(content)]


def scored(run: Path, capfd) -> dict:
    outcome = command(capfd, "test", run)
    assert outcome.code == 0, outcome.err[-3000:]
    return json.loads((run / "summary.json").read_text())["test"]


def exported(run: Path, target: str, capfd) -> dict[str, torch.Tensor]:
    outcome = command(capfd, "export", run, target)
    assert outcome.code == 0, outcome.err[-3000:]
    return load_file(Path(target) / "open_clip_model.safetensors")


def inspected(run: Path, capfd) -> str:
    outcome = command(capfd, "inspect", run)
    assert outcome.code == 0, outcome.err[-3000:]
    return "".join(outcome.out.split())  # long paths are folded


@pytest.mark.parametrize("kind", ["components", *SLOW])
def test_a_finished_run_gives_the_same_numbers(kind, words, capfd):
    run = fit([*words, "--id=a"]).absolute()
    before, merged, shown = scored(run, capfd), exported(run, "here", capfd), inspected(run, capfd)
    there = moved(run)
    decoy, bits = contents(run), (there / "coefficients.safetensors").read_bytes()
    assert scored(there, capfd) == before
    again = exported(there, "there", capfd)
    assert again.keys() == merged.keys() and all(torch.equal(value, merged[name]) for name, value in again.items())
    assert inspected(there, capfd) == shown.replace(str(run), str(there))
    outcome = command(capfd, "compare", words[0], there, "--folder", "table", "--lambdas", "0.3")
    assert outcome.code == 0, outcome.err[-3000:]
    row = json.loads(Path("table/comparison.json").read_text())["methods"]["deep/a"]
    assert row["average"] == before["average"]
    outcome = command(capfd, "fit", "--resume", there)
    assert outcome.code == 0 and (there / "coefficients.safetensors").read_bytes() == bits, outcome.err[-3000:]
    assert contents(run) == decoy


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["start", "components", "expert", "learned", "mask", "ranks", "chunks"])
def test_a_run_goes_on_with_a_stage_that_had_not_begun(kind, words, monkeypatch, capfd):
    whole = fit([*words, "--id=whole"]).absolute()
    last, plain = stages_of(whole)[-1], adamerge.runs.fit.write_config

    def cut(settings, path):
        if path.parent.name == last:
            raise RuntimeError("cut")
        plain(settings, path)

    with monkeypatch.context() as patch:
        patch.setattr("adamerge.runs.fit.write_config", cut)
        with pytest.raises(RuntimeError, match="cut"):
            fit([*words, "--id=a"])
    run = whole.with_name("a")
    there = moved(run)
    decoy = contents(run)
    monkeypatch.chdir(there / last)
    outcome = command(capfd, "fit", "--resume", "..")
    assert outcome.code == 0, outcome.err[-3000:]
    assert same_coefficients(there, whole) and same_coefficients(there / last, whole)
    for path in (there / f"{last}.yaml", there / last / "config.yaml", there / "config.yaml"):
        named = texts(yaml.safe_load(path.read_text()))
        inside = {text for text in named if text.startswith("{this_run}")}
        assert sorted(inside) == [f"{{this_run}}/{name}" for name in INSIDE[kind]], path
        assert not [text for text in named if str(run) in text or str(there) in text], path
    assert contents(run) == decoy


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["learned", "mask", "ranks", "chunks"])
def test_a_run_goes_on_within_a_stage_and_to_more_steps(kind, words, monkeypatch, capfd):
    whole = fit([*words, "--id=whole"]).absolute()
    last, plain = stages_of(whole)[-1], MergingModule.training_step

    def cut(self, batch, batch_idx):
        if self.trainer.default_root_dir.endswith(last) and self.global_step == 1:
            raise RuntimeError("cut")
        return plain(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(MergingModule, "training_step", cut)
        with pytest.raises(RuntimeError, match="cut"):
            fit([*words, "--id=a"])
    run = whole.with_name("a")
    there = moved(run)
    decoy = contents(run)
    assert command(capfd, "fit", "--resume", there).code == 0
    assert same_coefficients(there, whole)
    for one in (there, whole):
        outcome = command(capfd, "fit", "--resume", one, f"--{last[0]}.trainer.max_steps=5")
        assert outcome.code == 0 and json.loads((one / "summary.json").read_text())["step"] == 5, outcome.err[-3000:]
    assert same_coefficients(there, whole)
    assert contents(run) == decoy
