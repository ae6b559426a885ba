"""Summary: a fit that ends early says how far it came and goes on; a run that goes on for longer is the longer run."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Callback
from running import adam_state, command, fit_words, same_coefficients

from adamerge.runs.fit import fit
from adamerge.training.run_checkpoints import SessionTimer

COSINE = "--model.search.schedule=CosineDecay"


class StopsAtThree(Callback):
    """A user's own reason to end."""

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == 3


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def last_rate(run: Path) -> float:
    loaded = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return loaded["optimizer_states"][0]["param_groups"][0]["lr"]


@pytest.mark.slow
def test_a_fit_that_its_time_ends_says_so_and_goes_on_to_the_same_bits(pool_file, monkeypatch, capfd):
    """Each look at the clock takes a second: one before the fit, one after each step. Checkpoints are due at 2, 4, ..."""
    clock = itertools.count()
    monkeypatch.setattr(SessionTimer, "time_elapsed", lambda self, stage=None: float(next(clock)))
    words = fit_words(pool_file, "--name=n", steps=20)
    whole = fit([*words, "--id=whole"])
    clock = itertools.count()
    outcome = command(capfd, "fit", *words, "--id=a", "--trainer.max_time=00:00:00:05")
    run = Path("runs/n/a")
    assert outcome.code == 0, outcome.err[-2000:]
    found = summary(run)
    assert (found["status"], found["step"], found["max_steps"]) == ("stopped", 5, 20)
    assert found["stopped"] == "trainer.max_time"
    assert "stopped by trainer.max_time after 5 of 20 steps" in outcome.out and f"--resume {run}" in outcome.out
    clock = itertools.count()
    assert command(capfd, "fit", "--resume", run).code == 0
    assert summary(run)["step"] == 10, "all of the time again, from the step where it ended"
    monkeypatch.setattr(SessionTimer, "time_elapsed", lambda self, stage=None: 0.0)
    assert command(capfd, "fit", "--resume", run).code == 0
    found = summary(run)
    assert (found["status"], found["step"]) == ("finished", 20) and "stopped" not in found
    assert same_coefficients(run, whole)


def test_a_timer_of_a_session_remembers_nothing():
    timer = SessionTimer("00:00:00:05")
    timer.on_train_start(None, None)
    assert timer.state_dict() == {}


def test_a_callback_of_the_users_ends_a_fit(pool_file, capfd):
    callback = f"--trainer.callbacks=[{{class_path: {StopsAtThree.__module__}.StopsAtThree}}]"
    outcome = command(capfd, "fit", *fit_words(pool_file, "--name=n", "--id=a", callback, steps=9))
    found = summary(Path("runs/n/a"))
    assert outcome.code == 0 and "stopped by a callback after 3 of 9 steps" in outcome.out
    assert (found["status"], found["step"], found["stopped"]) == ("stopped", 3, "a callback")


@pytest.mark.parametrize(
    "form", [["--trainer.max_steps=7"], pytest.param(["--trainer.max_steps", "7"], marks=pytest.mark.slow)]
)
def test_a_finished_run_goes_on_and_is_the_long_run_bit_for_bit(form, pool_file, capfd):
    """At a constant rate, with Adam, whose state must be the long run's too."""
    long = fit(fit_words(pool_file, "--name=n", "--id=long", steps=7))
    run = fit(fit_words(pool_file, "--name=n", "--id=a", steps=4))
    assert not same_coefficients(run, long)
    outcome = command(capfd, "fit", "--resume", run, *form)
    assert outcome.code == 0, outcome.err[-2000:]
    assert same_coefficients(run, long)
    one, other = adam_state(run), adam_state(long)
    assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)
    found = summary(run)
    assert (found["status"], found["step"], found["max_steps"]) == ("finished", 7, 7)
    assert found["lengths"] == [{"from": 4, "to": 7, "after": 4, "learning_rate": "constant"}]
    configs = [yaml.safe_load((place / "config.yaml").read_text()) for place in (run, long)]
    for config in configs:
        config["id"] = None
    assert configs[0] == configs[1]
    assert command(capfd, "fit", "--resume", run).code == 0, "and resumes as any other"
    assert summary(run)["lengths"] == found["lengths"] and same_coefficients(run, long)


def test_a_schedule_is_rebuilt_for_the_new_length(pool_file, capfd):
    run = fit(fit_words(pool_file, "--name=n", "--id=a", COSINE, "--model.search.lr=0.1", steps=2))
    assert last_rate(run) == pytest.approx(0, abs=1e-12)
    outcome = command(capfd, "fit", "--resume", run, "--trainer.max_steps=3")
    assert outcome.code == 0 and "learning rate: rebuilt for the new length" in outcome.out
    assert last_rate(run) == pytest.approx(0, abs=1e-12)
    assert summary(run)["lengths"] == [{"from": 2, "to": 3, "after": 2, "learning_rate": "rebuilt for the new length"}]
    before = torch.load(run / "checkpoints" / "step=2.ckpt", weights_only=True)["state_dict"][
        "merged.parametrization.w"
    ]
    after = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["merged.parametrization.w"]
    step = (after - before).abs().max()
    assert 0.001 < step <= 1.01 * 0.1 * 0.25 * 1.8, "the third step is at a quarter of the rate, not at the 0 before"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--trainer.max_steps=2"], "has done 3 steps"),
        pytest.param(["--trainer.max_steps=3"], "has done 3 steps", marks=pytest.mark.slow),
        (["--trainer.max_steps=many"], "max_steps=many"),
        (["--trainer.max_steps"], "--trainer.max_steps has no value"),
        pytest.param(
            ["--trainer.max_steps=5", "--model.search.lr=3"],
            "cannot change --model.search.lr=3",
            marks=pytest.mark.slow,
        ),
        (["--model.search.lr=3"], "cannot change --model.search.lr=3"),
    ],
)
def test_what_a_resumed_run_cannot_change(words, named, pool_file, capfd):
    run = fit(fit_words(pool_file, "--name=n", "--id=a"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    outcome = command(capfd, "fit", "--resume", run, *words)
    assert outcome.code == 2 and named in outcome.error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_one_of_torchs_schedules_does_not_grow_with_the_run(pool_file, capfd):
    schedule = ["--model.search.schedule=torch.optim.lr_scheduler.CosineAnnealingLR", "--model.search.schedule.T_max=3"]
    run = fit(fit_words(pool_file, "--name=n", "--id=a", *schedule))
    outcome = command(capfd, "fit", "--resume", run, "--trainer.max_steps=6")
    assert outcome.code == 2 and "T_max=3" in outcome.error
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 3
