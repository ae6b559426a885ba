"""Callbacks: how a run's end is told, the guards and the last good state, safe checkpoints."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from modules import descending
from running import coefficients, command, fit_words

import adamerge
from adamerge.backbones import OpenClipClassifier
from adamerge.errors import CollapsedError, ConfigError, DivergedError
from adamerge.objectives import Entropy
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training import MergingModule
from adamerge.training.callbacks import RunawayGuard


class Disturb(Entropy):
    """Entropy, times a factor at one step of the fit."""

    factor, at = float("nan"), 2

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, output, batch):
        step, self.calls = self.calls // 2, self.calls + 1  # two tasks a step
        return super().forward(output, batch) * (self.factor if step == self.at else 1.0)


def disturbed(monkeypatch, factor: float, at: int) -> str:
    monkeypatch.setattr(Disturb, "factor", factor)
    monkeypatch.setattr(Disturb, "at", at)
    return f"--model.objective={__name__}.Disturb"


def values_after(pool_file, capfd, steps: int) -> dict[str, torch.Tensor]:
    words = fit_words(pool_file, "--name=good", f"--id={steps}", "--model.search.lr=0.01", steps=steps)
    assert command(capfd, "fit", *words).code == 0
    return coefficients(Path("runs/good") / str(steps))


def test_the_heat_map_is_given_the_networks_order(pool_file, monkeypatch, capfd):
    drawn = {}

    def draw(table, path, title, **more):
        drawn.update(more, names=list(table), title=title)
        path.touch()

    monkeypatch.setattr("adamerge.training.callbacks.draw_heatmap", draw)
    assert command(capfd, "fit", *fit_words(pool_file, "--name=drawn", "--id=a", steps=1)).code == 0
    assert drawn["title"] == "Merging coefficients after 1 steps" and drawn["masks"] == {}
    assert drawn["names"] == sorted(drawn["names"]) and set(drawn["names"]) <= set(drawn["order"])
    block = [name for name in drawn["order"] if name.startswith("visual.transformer.resblocks.0.")]
    assert [name.split(".")[4] for name in block][::2] == ["ln_1", "attn", "attn", "ln_2", "mlp", "mlp"]


@pytest.mark.parametrize("factor", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow)])
@pytest.mark.parametrize("at", [0, pytest.param(2, marks=pytest.mark.slow), 5])
def test_a_step_that_is_not_finite_is_undone_named_and_ends_the_run(factor, at, pool_file, monkeypatch, capfd):
    """Step ``at`` (from 0) is the first bad one; 5 is the last step of all."""
    objective = disturbed(monkeypatch, factor, at)
    words = fit_words(
        pool_file, "--name=bad", "--id=a", "--model.search.lr=0.01", objective, "--model.hold=false", steps=6
    )
    outcome = command(capfd, "fit", *words)
    run = Path("runs/bad/a")
    assert outcome.code == 4, (outcome.code, outcome.err[-2000:])
    assert f"step {at + 1}" in outcome.error and ("colours" in outcome.error or "shapes" in outcome.error)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "diverged" and f"step {at + 1}" in summary["error"]
    found = coefficients(run)
    assert all(torch.isfinite(value).all() for value in found.values())
    if at:
        good = values_after(pool_file, capfd, at)
        assert all(torch.equal(value, good[name]) for name, value in found.items())
    else:
        assert all((value == 0.3).all() for value in found.values())
    for path in (run / "checkpoints").glob("*.ckpt"):
        assert torch.isfinite(torch.load(path, weights_only=True)["state_dict"]["merged.parametrization.w"]).all()


def test_a_diverged_run_does_not_become_a_finished_one_by_resuming(pool_file, monkeypatch, capfd):
    objective = disturbed(monkeypatch, float("nan"), 5)
    words = fit_words(pool_file, "--name=bad", "--id=a", objective, steps=6)
    command(capfd, "fit", *words)
    monkeypatch.setattr(Disturb, "at", 0)
    outcome = command(capfd, "fit", "--resume", "runs/bad/a")
    status = json.loads(Path("runs/bad/a/summary.json").read_text())["status"]
    assert (outcome.code, status) == (2, "diverged")


def ended(pool_file, capfd, monkeypatch, error: BaseException) -> tuple[int | None, dict]:
    plain = MergingModule.training_step

    def step(self, batch, batch_idx):
        if self.global_step == 2:
            raise error
        assert json.loads(Path("runs/n/a/summary.json").read_text())["status"] == "running"
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(MergingModule, "training_step", step)
    code = None
    try:
        code = command(capfd, "fit", *fit_words(pool_file, "--name=n", "--id=a", steps=4)).code
    except type(error):
        pass
    return code, json.loads(Path("runs/n/a/summary.json").read_text())


def test_summary_of_a_run_that_collapsed(pool_file, capfd, monkeypatch):
    code, summary = ended(pool_file, capfd, monkeypatch, CollapsedError("one class for all of task 'shapes'"))
    assert (code, summary["status"], summary["step"]) == (4, "collapsed", 2)
    assert summary["error"] == "one class for all of task 'shapes'"


def test_summary_of_a_run_that_failed(pool_file, capfd, monkeypatch):
    code, summary = ended(pool_file, capfd, monkeypatch, RuntimeError("the network is on fire"))
    assert code is None, "a bug of the program keeps its trace"
    assert summary["status"] == "failed" and "on fire" in summary["error"]
    assert coefficients(Path("runs/n/a"))


FREE = "--model.parametrization.init_args.constraint=adamerge.constraints.Free"


def guarded_by(**arguments: float) -> str:
    return (
        f"--trainer.callbacks={json.dumps([{'class_path': 'adamerge.callbacks.RunawayGuard', 'init_args': arguments}])}"
    )


@pytest.mark.parametrize(
    ("words", "step"), [([], 5), ([guarded_by(every=2)], 2)], ids=["looked at at the end", "at every second step"]
)
def test_coefficients_that_ran_away_end_the_fit(words, step, pool_file, capfd):
    """Adam's first step is of the rate's size, and the bound is 10, ten times which is too much."""
    outcome = command(
        capfd, "fit", *fit_words(pool_file, "--name=n", "--id=a", "--model.search.lr=1e3", FREE, *words, steps=5)
    )
    assert outcome.code == 4, (outcome.code, outcome.err[-2000:])
    assert f"step {step}: a coefficient ran away: of expert" in outcome.error
    assert json.loads(Path("runs/n/a/summary.json").read_text())["status"] == "diverged"


@pytest.mark.parametrize("kind", ["RowColumnWise", "ElementWise"])
def test_of_many_coefficients_that_of_a_tensor_as_a_whole_counts(kind, pool):
    """One number in a hundred may be what it likes; a task vector that is taken a hundred times may not."""
    vectors = TaskVectors(**pool)
    module = descending(OpenClipClassifier(pool["base"]), vectors, getattr(adamerge, kind), Entropy())
    values = module.merged.parametrization.values()
    group = max((name for name in values if not name.endswith("columns")), key=lambda name: values[name].shape[1])
    guard = RunawayGuard(bound=5.0)
    values[group][1, 0] = 20.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        guard._look(1, module)
    values[group][1] = 20.0
    with pytest.warns(UserWarning, match=f"of expert '{vectors.experts[1]}' for '{group.removesuffix('/rows')}', 20"):
        guard._look(2, module)
    values[group][1] = 200.0
    with pytest.raises(DivergedError, match="ran away"):
        guard._look(3, module)


@pytest.mark.parametrize(
    ("rate", "words", "told"),
    [(20, [], True), (20, [guarded_by(bound=1e6)], False), (1e3, [guarded_by(bound=1e6)], False), (0.1, [], False)],
)
def test_large_coefficients_are_told_and_who_means_them_says_so(rate, words, told, pool_file, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        words = fit_words(pool_file, "--name=n", "--id=a", f"--model.search.lr={rate}", FREE, *words, steps=2)
        outcome = command(capfd, "fit", *words)
    assert outcome.code == 0, outcome.err[-2000:]
    assert sum("ran away" in str(warning.message) for warning in caught) == told


@pytest.mark.parametrize("arguments", [{"bound": 0.0}, {"bound": float("nan")}, {"every": 0}])
def test_a_runaway_guard_that_could_not_guard(arguments):
    with pytest.raises(ConfigError, match="must be positive"):
        RunawayGuard(**arguments)
