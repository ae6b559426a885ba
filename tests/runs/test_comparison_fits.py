"""Fits of a comparison: one a row and seed, with the words of what was asked for; what has ended is not repeated."""

import json
from pathlib import Path

import pytest
from running import LAYER_WISE, METHODS, TASK_ARITHMETIC, pool_config, write_yaml

from adamerge.errors import CollapsedError, ConfigError, DivergedError
from adamerge.runs.command_line import Words
from adamerge.runs.comparison_fits import Fit, first_runs, fit_all, fits_of, run_of
from adamerge.runs.comparison_rows import Choices, Row, rows_of

TASKS = ["colours", "shapes"]
STAGED = METHODS / "expert_merging_plusplus"


@pytest.fixture
def pool_file(pool, image_folders, tmp_path):
    return write_yaml(tmp_path / "tiny.yaml", pool_config(pool, image_folders))


def words_of(pool_file, *methods, **choices):
    rows = rows_of(pool_file, methods, Words(overrides=["--data.batch_size=4"]))
    return [(fit.row, fit.seed, fit.words.overrides[1:]) for fit in fits_of(rows, TASKS, Choices(**choices))]


def test_without_choices_each_row_is_one_fit_of_its_own_words(pool_file):
    assert words_of(pool_file, LAYER_WISE, TASK_ARITHMETIC) == [
        ("adamerging_layer_wise", "", []),
        ("task_arithmetic", "", []),
    ]


def test_each_seed_is_a_fit(pool_file):
    assert words_of(pool_file, LAYER_WISE, seeds=(3, 1)) == [
        ("adamerging_layer_wise", "3", ["--seed=3"]),
        ("adamerging_layer_wise", "1", ["--seed=1"]),
    ]


def test_what_is_left_out_is_no_expert_and_no_data(pool_file):
    ((_, _, words),) = words_of(pool_file, LAYER_WISE, leave_out=("shapes",))
    assert words == ["--leave_out=[shapes]", "--data.only=[colours]"]
    for wrong, told in ((("gone",), "no task 'gone'"), (tuple(TASKS), "no task is left")):
        with pytest.raises(ConfigError, match=told):
            words_of(pool_file, LAYER_WISE, leave_out=wrong)


def test_forward_passes_are_batches_times_tasks_times_steps(pool_file):
    """4 samples of 2 tasks a step: 8 a step; of the one task that is left, 4."""
    assert words_of(pool_file, LAYER_WISE, forward_passes=80)[0][2] == ["--trainer.max_steps=10"]
    words = words_of(pool_file, LAYER_WISE, forward_passes=80, leave_out=("shapes",))[0][2]
    assert words[-1] == "--trainer.max_steps=20"
    assert words_of(pool_file, TASK_ARITHMETIC, forward_passes=80)[0][2] == [], "it has no search"
    with pytest.raises(ConfigError, match="a step of .* takes 8"):
        words_of(pool_file, LAYER_WISE, forward_passes=3)


def test_stages_share_the_forward_passes_as_they_shared_the_steps(pool_file):
    """16 samples of 2 tasks a step, and 10 and 30 steps: a quarter and three quarters of 12,800 passes."""
    words = ["--data.batch_size=16", "--1.trainer.max_steps=10", "--2.trainer.max_steps=30"]
    (fit,) = fits_of(rows_of(pool_file, [STAGED], Words(overrides=words)), TASKS, Choices(forward_passes=12800))
    assert fit.words.overrides[3:] == ["--1.trainer.max_steps=100", "--2.trainer.max_steps=300"]


def test_another_seed_is_another_run_and_the_same_words_the_same(pool_file, tmp_path):
    rows = rows_of(pool_file, [LAYER_WISE], Words())
    fits = fits_of(rows, TASKS, Choices(seeds=(0, 1)))
    runs = [run_of(fit.method, fit.words, tmp_path) for fit in fits]
    assert len(set(runs)) == 2 and runs == [run_of(fit.method, fit.words, tmp_path) for fit in fits]


def test_the_seeds_that_did_not_end_well_are_left_out(tmp_path, monkeypatch):
    errors = {"1": CollapsedError("one class"), "2": DivergedError("nan")}

    def fitted(method, words, folder):
        seed = words.overrides[0]
        if seed in errors:
            raise errors[seed]
        run = tmp_path / f"run{seed}"
        run.mkdir(exist_ok=True)
        (run / "summary.json").write_text(json.dumps({"status": "stopped" if seed == "3" else "finished"}))
        return run

    monkeypatch.setattr("adamerge.runs.comparison_fits.fitted", fitted)
    fits = [Fit("mine", seed, Words([], [seed]), Path("mine.yaml")) for seed in "0123"]
    runs, left = fit_all(fits, tmp_path)
    assert runs == {"mine": {"0": tmp_path / "run0"}} and first_runs(runs) == {"mine": tmp_path / "run0"}
    assert left == {"mine, seed 1": "collapsed", "mine, seed 2": "diverged", "mine, seed 3": "stopped"}
    assert Row("x", Path("x"), Words()).name == "x"


def test_what_ended_before_its_time_is_left_out_each_time(tmp_path, monkeypatch, capsys):
    """A run that diverged is no reason to lose the table, the second time either; one that stopped goes on."""
    from adamerge.runs import comparison_fits as comparison

    for status in ("diverged", "collapsed", "stopped"):
        run = tmp_path / status
        run.mkdir()
        (run / "summary.json").write_text(json.dumps({"status": status}))
        monkeypatch.setattr(comparison, "run_of", lambda *words, run=run: run)
        monkeypatch.setattr(comparison, "started", lambda run: True)
        resumed = []
        monkeypatch.setattr(comparison, "fit_stages", lambda words, resume, resumed=resumed: resumed.append(resume))
        assert comparison.fitted(tmp_path, Words(), tmp_path) == run
        assert resumed == ([run] if status == "stopped" else [])
