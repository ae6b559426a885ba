"""Stages: one command runs a folder of configurations; finished stages stay, killed ones go on, the last one is the run."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CLASSES
from running import (
    LAYER_WISE,
    METHODS,
    QUICK,
    TASK_ARITHMETIC,
    adam_state,
    coefficients,
    command,
    environment,
    same_coefficients,
    write_yaml,
)
from safetensors.torch import load_file

from adamerge.runs.configuration import configurations
from adamerge.runs.stages import fit

FIRST = {"class_path": "adamerge.parametrizations.LayerWise", "init_args": {"init": 0.3}}
ENTROPY = {"class_path": "adamerge.objectives.Entropy"}


def stage(**model):
    return {
        "model": {"parametrization": FIRST, "objective": ENTROPY, "search": {"lr": 0.05}, **model},
        "trainer": {"max_steps": 3},
    }


@pytest.fixture
def method(tmp_path):
    """Two fits, the second from where the first ended."""
    folder = tmp_path / "methods" / "twice"
    write_yaml(folder / "1_first.yaml", stage())
    write_yaml(folder / "2_second.yaml", stage(init_from="{previous}", lr=0.02))
    return folder


def words(pool_file, method, *more):
    return ["--config", str(pool_file), "--config", str(method), *QUICK, *map(str, more)]


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_one_command_runs_both_and_the_run_is_the_last(pool_file, method, capfd):
    outcome = command(capfd, "fit", *words(pool_file, method, "--id=a"))
    run = Path("runs/tiny-twice/a")
    assert outcome.code == 0, outcome.err[-3000:]
    assert str(run) in outcome.out and "stage 2 of 2: 2_second" in outcome.out
    assert {"1_first", "2_second"} <= {path.name for path in run.iterdir() if path.is_dir()}
    for name in ("coefficients.safetensors", "config.yaml", "heatmap.png", "environment.json"):
        assert (run / name).read_bytes() == (run / "2_second" / name).read_bytes()
    assert not same_coefficients(run / "1_first", run)
    found = summary(run)
    assert (found["status"], found["step"]) == ("finished", 3)
    assert [found["stages"][name]["status"] for name in ("1_first", "2_second")] == ["finished"] * 2
    assert "adamerge-" not in " ".join(path.name for path in run.rglob("*"))


@pytest.mark.slow
def test_it_is_what_two_commands_would_find(pool_file, method):
    run = fit(words(pool_file, method, "--id=a"))
    first = fit(words(pool_file, method / "1_first.yaml", "--name=by_hand", "--id=1"))
    start = f"--model.init_from={first / 'coefficients.safetensors'}"
    second = fit(words(pool_file, method / "2_second.yaml", start, "--name=by_hand", "--id=2"))
    assert same_coefficients(run / "1_first", first) and same_coefficients(run, second)


@pytest.mark.slow
def test_overrides_reach_every_stage_or_the_one_they_name(pool_file, method):
    run = fit(
        words(
            pool_file,
            method,
            "--id=a",
            "--trainer.max_steps=2",
            "--2.model.search.lr=0.5",
            "--1.model.search.lr",
            "0.25",
        )
    )
    configs = [yaml.safe_load((run / name / "config.yaml").read_text()) for name in ("1_first", "2_second")]
    assert [config["model"]["search"]["init_args"]["lr"] for config in configs] == [0.25, 0.5]
    assert [config["trainer"]["max_steps"] for config in configs] == [2, 2]
    assert [config["model"]["init_from"] for config in configs] == [
        None, "{this_run}/1_first/coefficients.safetensors",
    ]  # fmt: skip


@pytest.mark.slow
def test_an_id_is_used_once_and_a_finished_run_resumes_to_itself(pool_file, method, capfd):
    run = fit(words(pool_file, method, "--id=a"))
    before = contents(run)
    outcome = command(capfd, "fit", *words(pool_file, method, "--id=a"))
    assert outcome.code == 2 and "holds a run already" in outcome.error
    assert command(capfd, "fit", "--resume", run).code == 0
    assert contents(run) == before
    outcome = command(capfd, "fit", "--resume", run, "--model.search.lr=3")
    assert outcome.code == 2 and "--model.search.lr=3" in outcome.error


@pytest.mark.slow
def test_a_stage_that_fails_is_the_runs_failure_and_can_be_resumed(pool_file, method, capfd):
    content = yaml.safe_load((method / "2_second.yaml").read_text())
    content["model"]["init_from"] = "{run}/gone.safetensors"
    write_yaml(method / "2_second.yaml", content)
    outcome = command(capfd, "fit", *words(pool_file, method, "--id=a"))
    run = Path("runs/tiny-twice/a")
    assert outcome.code == 3 and "gone.safetensors" in outcome.error
    assert summary(run)["status"] == "running" and not (run / "coefficients.safetensors").exists()
    first = contents(run / "1_first")
    shutil.copy(run / "1_first" / "coefficients.safetensors", run / "gone.safetensors")
    shutil.rmtree(method)  # what was begun does not change any more
    assert command(capfd, "fit", "--resume", run).code == 0
    assert contents(run / "1_first") == first and summary(run)["status"] == "finished"


@pytest.mark.slow
def test_a_diverged_stage_ends_the_run(pool_file, method, capfd):
    class_path = {"class_path": "runs.test_stages.Exploding"}
    content = yaml.safe_load((method / "1_first.yaml").read_text())
    write_yaml(method / "1_first.yaml", {**content, "model": {**content["model"], "objective": class_path}})
    outcome = command(capfd, "fit", *words(pool_file, method, "--id=a"))
    run = Path("runs/tiny-twice/a")
    assert outcome.code == 4 and summary(run)["status"] == "diverged" and not (run / "2_second").exists()
    outcome = command(capfd, "fit", "--resume", run)
    assert outcome.code == 2 and "has diverged" in outcome.error


def exploding():
    from adamerge.objectives import Entropy

    class Exploding(Entropy):
        """Not finite at once."""

        def forward(self, output, batch):
            return super().forward(output, batch) * float("inf")

    Exploding.__module__, Exploding.__qualname__ = __name__, "Exploding"
    return Exploding


Exploding = exploding()

KILLED = """
import os, signal, sys
from adamerge.cli import main
from adamerge.training import MergingModule
plain = MergingModule.training_step

def dying(self, batch, batch_idx):
    if self.trainer.default_root_dir.endswith(sys.argv[1]) and self.global_step == 14:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, batch, batch_idx)

MergingModule.training_step = dying
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "place"), [("2_second", "killed"), ("1_first", "killed"), ("1_first", "moved")])
def test_a_killed_stage_goes_on_to_the_same_bits(stage, place, pool_file, method, tmp_path, capfd, request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the child has
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    given = words(pool_file, method, "--trainer.max_steps=20", "--name=soak")
    whole = fit([*given, "--id=whole"])
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    line = [sys.executable, str(script), stage, "fit", *given, "--id=killed"]
    ended = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    run = Path("runs/soak/killed")
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    assert summary(run)["status"] == "running" and not (run / "coefficients.safetensors").exists()
    run = run.rename(run.with_name(place))
    kept = contents(run / "1_first")
    assert command(capfd, "fit", "--resume", run).code == 0
    assert stage == "1_first" or contents(run / "1_first") == kept, "a finished stage is not touched"
    for name in ("1_first", "2_second"):
        assert same_coefficients(run / name, whole / name)
    one, other = adam_state(whole / "2_second"), adam_state(run / "2_second")
    assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)
    assert same_coefficients(run, whole)
    assert sorted(path.name for path in run.parent.iterdir()) == sorted([place, "whole"])


def test_every_stage_is_checked_before_the_first_begins(pool_file, method, capfd):
    content = yaml.safe_load((method / "2_second.yaml").read_text())
    write_yaml(method / "2_second.yaml", {**content, "model": {**content["model"], "rl": 0.1}})
    outcome = command(capfd, "fit", *words(pool_file, method))
    assert outcome.code == 2 and "2_second.yaml" in outcome.error and "rl" in outcome.error
    assert not Path("runs").exists()
    outcome = command(capfd, "fit", *words(pool_file, method, "--3.model.search.lr=1"))
    assert outcome.code == 2 and not Path("runs").exists()


def test_stages_that_are_not_there_cannot_be_overridden(pool_file, method, capfd):
    outcome = command(capfd, "fit", *words(pool_file, method, "--3.model.search.lr=1"))
    assert outcome.code == 2 and "no stage 3" in outcome.error and not Path("runs").exists()
    outcome = command(capfd, "fit", *words(pool_file, LAYER_WISE, "--1.model.search.lr=1"))
    assert outcome.code == 2 and "1.model.search.lr" in outcome.error


def test_the_first_stage_has_nothing_before_it(pool_file, method, capfd):
    write_yaml(method / "1_first.yaml", stage(init_from="{previous}"))
    outcome = command(capfd, "fit", *words(pool_file, method))
    assert outcome.code == 2 and "1_first.yaml" in outcome.error and "no stage before" in outcome.error


@pytest.mark.parametrize(
    "names", [[], ["2_a.yaml"], ["1_a.yaml", "3_b.yaml"], ["1_a.yaml", "b.yaml"], ["1_a.yaml", "1_b.yaml"]]
)
def test_a_folder_that_is_no_method_is_refused(names, pool_file, tmp_path, capfd):
    for name in names:
        write_yaml(tmp_path / "odd" / name, stage())
    (tmp_path / "odd").mkdir(exist_ok=True)
    outcome = command(capfd, "fit", *words(pool_file, tmp_path / "odd"))
    assert outcome.code == 2 and "odd is not a method of stages" in outcome.error


def test_stages_go_by_number_and_two_folders_are_refused(pool_file, method, tmp_path, capfd):
    for number in range(1, 12):
        write_yaml(tmp_path / "long" / f"{number}_x.yaml", stage())
    stages = configurations(["--config", str(pool_file), "--config", str(tmp_path / "long")])
    assert [stage.file.name for stage in stages] == [f"{n}_x.yaml" for n in range(1, 12)]
    outcome = command(capfd, "fit", *words(pool_file, method, "--config", tmp_path / "long"))
    assert outcome.code == 2 and "at most one folder" in outcome.error


@pytest.mark.slow
def test_a_stage_without_an_objective(pool_file, method):
    write_yaml(method / "2_second.yaml", {"model": {"parametrization": FIRST, "init_from": "{previous}"}})
    run = fit(words(pool_file, method, "--id=a"))
    assert same_coefficients(run, run / "1_first") and summary(run)["status"] == "finished"


def test_fast_dev_run_looks_at_the_first_stage_and_leaves_nothing(pool_file, method):
    assert fit(words(pool_file, method, "--trainer.fast_dev_run=true")) is None
    assert not Path("runs").exists()


def test_fast_dev_run_keeps_nothing_of_teachers_either(pool_file):
    before = sorted(Path().rglob("*"))
    assert fit(words(pool_file, METHODS / "expert_merging_plusplus", "--trainer.fast_dev_run=true")) is None
    assert sorted(Path().rglob("*")) == before


@pytest.mark.slow
def test_test_inspect_and_export_take_a_staged_run(pool_file, method, capfd):
    run = fit(words(pool_file, method, "--id=a"))
    outcome = command(capfd, "test", run)
    assert outcome.code == 0 and "average" in outcome.out, outcome.err[-2000:]
    scores = summary(run)["test"]
    assert command(capfd, "fit", "--resume", run).code == 0 and summary(run)["test"] == scores
    outcome = command(capfd, "inspect", run)
    assert outcome.code == 0 and "finished after 3 steps" in outcome.out
    assert command(capfd, "export", run / "coefficients.safetensors", "merged").code == 0
    assert Path("merged/open_clip_model.safetensors").is_file()


@pytest.mark.slow
def test_the_stage_that_the_run_is_in_goes_on_for_more_steps(pool_file, method, capfd):
    """Only the last that has begun: others have built on the ones before it."""
    run = fit(words(pool_file, method, "--id=a"))
    long = fit(words(pool_file, method, "--id=long", "--2.trainer.max_steps=5"))
    before = contents(run)
    for given in (
        ["--trainer.max_steps=5"],
        ["--1.trainer.max_steps=5"],
        ["--2.model.search.lr=1"],
        ["--2.trainer.max_steps=3"],
    ):
        outcome = command(capfd, "fit", "--resume", run, *given)
        assert outcome.code == 2, given
        assert "--2.trainer.max_steps=N" in outcome.err or "has done 3 steps" in outcome.error
        assert contents(run) == before
    outcome = command(capfd, "fit", "--resume", run, "--2.trainer.max_steps=5")
    assert outcome.code == 0, outcome.err[-2000:]
    assert same_coefficients(run, long) and same_coefficients(run / "1_first", long / "1_first")
    found = summary(run)
    assert (found["status"], found["step"]) == ("finished", 5)
    assert found["stages"]["2_second"]["lengths"][0]["from"] == 3


@pytest.mark.slow
def test_a_stage_that_ended_early_is_not_built_on(pool_file, method, capfd):
    end = "--1.trainer.callbacks=[{class_path: runs.test_summary.StopsAtThree}]"
    outcome = command(capfd, "fit", *words(pool_file, method, "--id=a", "--1.trainer.max_steps=5", end))
    run = Path("runs/tiny-twice/a")
    assert outcome.code == 0 and "stopped by a callback after 3 of 5 steps" in outcome.out
    assert summary(run)["status"] == "stopped" and not (run / "2_second").exists()
    assert command(capfd, "fit", "--resume", run).code == 0
    assert summary(run)["status"] == "finished" and summary(run / "1_first")["step"] == 5


@pytest.mark.slow
def test_compare_takes_a_folder_beside_files(pool_file, method, monkeypatch, capfd):
    monkeypatch.setattr("adamerge.runs.compare.LAMBDAS", [0.3])
    given = ["compare", pool_file, method, TASK_ARITHMETIC, "--folder", "table", *QUICK, "--2.model.search.lr=0.5"]
    outcome = command(capfd, *given)
    assert outcome.code == 0, outcome.err[-3000:]
    result = json.loads(Path("table/comparison.json").read_text())
    assert {"twice", "task_arithmetic"} <= result["methods"].keys()
    run = Path(result["runs"]["twice"])
    assert coefficients(run).keys() == coefficients(run / "2_second").keys()
    before = contents(run)
    assert command(capfd, *given).code == 0 and contents(run) == before, "a finished fit is not repeated"
    write_yaml(method / "2_second.yaml", stage(init_from="{previous}", lr=0.03))
    assert command(capfd, *given).code == 0
    assert json.loads(Path("table/comparison.json").read_text())["runs"]["twice"] != str(run), "a change is another fit"


@pytest.mark.slow
def test_expert_merging_plusplus_in_one_command(pool_file, pool, capfd):
    """The allocation is the formula's, chunks follow it, what is frozen stays at the prior, every expert runs once."""
    given = words(pool_file, METHODS / "expert_merging_plusplus", "--trainer.max_steps=1", "--2.trainer.max_steps=5")
    outcome = command(capfd, "fit", *given, "--id=a")
    assert outcome.code == 0, outcome.err[-3000:]
    run = Path("runs/tiny-expert_merging_plusplus/a")
    base = load_file(Path(pool["base"]) / "open_clip_model.safetensors")
    experts = [load_file(path) for path in pool["experts"].values()]
    first, second = coefficients(run / "1_expert_merging"), coefficients(run)
    importance = {
        name: sum(
            1
            / (1 + math.exp(-float(first[f"w/{name}"][k, 0])))
            * float((expert[name] - base[name]).double().abs().sum())
            for k, expert in enumerate(experts)
        )
        for name in experts[0]
    }
    total, layers = sum(importance.values()), len(importance)
    expected = {name: math.floor(1.0 * layers * value / total + 1e-9) for name, value in importance.items()}
    assert json.loads((run / "2_chunks" / "allocation.json").read_text()) == expected
    assert (run / "allocation.json").read_bytes() == (run / "2_chunks" / "allocation.json").read_bytes()
    assert 0 in expected.values() and max(expected.values()) > 2, "some are frozen, some are cut"
    assert {name: value.shape[1] for name, value in second.items()} == {
        f"w/{name}": count for name, count in expected.items() if count
    }
    assert f"{sum(expected.values())} coefficients per expert" in outcome.out
    frozen = next(name for name, count in expected.items() if not count)
    assert command(capfd, "export", run / "coefficients.safetensors", "merged").code == 0
    merged = load_file("merged/open_clip_model.safetensors")[frozen]
    prior = base[frozen].double() + 0.3 * sum(expert[frozen].double() - base[frozen] for expert in experts)
    assert (merged - prior).abs().max() < 1e-6
    stages = summary(run)["stages"]
    taught = [stages[name]["teachers"] for name in ("1_expert_merging", "2_chunks")]
    assert taught[0]["forwards"] == dict.fromkeys(CLASSES, 4) == taught[1]["found"]
    assert taught[1]["forwards"] == dict.fromkeys(CLASSES, 2), (
        "six samples a task, each run once in both stages together"
    )
