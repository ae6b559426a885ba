"""Tracking: which loggers a fit has, that they are closed with it, and which rows of a killed run stay."""

import csv
import json
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from running import command, fit_words, pool_config, without_pictures, write_yaml
from wandb_files import WandbFile, files_of, without_users_own

from adamerge.training.loggers import start_metrics, tracked
from training.test_tracker import Broken


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder with a configuration that holds a secret, and wandb offline."""
    without_users_own(monkeypatch, tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_yaml(tmp_path / "n" / "seed0" / "config.yaml", {"model": {"lr": 0.25}, "data": {"token": "canary"}})
    return tmp_path / "n" / "seed0"


def kinds(loggers) -> list[str]:
    return [type(getattr(logger, "inner", logger)).__name__ for logger in loggers]


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [None, True])
def test_without_a_choice_there_are_our_csv_and_wandb(chosen, run):
    with tracked(run, chosen) as loggers:
        assert kinds(loggers) == ["CSVLogger", "WandbLogger"]
        loggers[1].log_metrics({"train/loss": 0.5}, 3)
    (path,) = files_of(run)
    found = WandbFile(path)
    assert found.config["model"] == {"lr": 0.25} and found.config["data"] == {"token": "…"}
    assert found.values("train/loss") == [0.5] and found.values("trainer/global_step") == [3]
    assert found.exit_code == 0


def test_false_leaves_wandb_out_and_keeps_our_csv(run):
    with tracked(run, False) as loggers:
        assert kinds(loggers) == ["CSVLogger"]
        loggers[0].log_metrics({"train/loss": 0.5}, 0)
        loggers[0].save()
    assert not (run / "wandb").exists() and rows_of(run) == [{"step": "0", "train/loss": "0.5"}]


def test_the_users_loggers_write_where_they_say_and_know_the_configuration(run, tmp_path):
    own = [CSVLogger(tmp_path / "mine", name="a"), CSVLogger(tmp_path / "mine", name="b")]
    for chosen in (own, own[0]):
        with tracked(run, chosen) as loggers:
            assert kinds(loggers) == ["CSVLogger"] * (1 + (2 if chosen is own else 1)) + ["WandbLogger"]
            for logger in loggers:
                logger.log_metrics({"train/loss": 0.5}, 0)
                logger.save()
    for name in "ab":
        assert "0.5" in (tmp_path / "mine" / name / "version_0" / "metrics.csv").read_text()
        logged = (tmp_path / "mine" / name / "version_0" / "hparams.yaml").read_text()
        assert "0.25" in logged and "canary" not in logged
    assert (run / "metrics.csv").is_file()


def test_a_users_wandb_logger_takes_the_place_of_ours(run, monkeypatch):
    monkeypatch.setenv("WANDB_NAME", "of the environment")
    own = WandbLogger(name="mine", project="theirs", tags=["x"], offline=True, prefix="p")
    with tracked(run, own) as loggers:
        assert kinds(loggers) == ["CSVLogger", "WandbLogger"] and loggers[1].inner is own
        own.log_metrics({"train/loss": 0.5}, 0)
    (path,) = files_of(run)
    found = WandbFile(path)
    assert (found.run.display_name, found.run.project, list(found.run.tags)) == ("mine", "theirs", ["x"])
    assert found.values("p-train/loss") == [0.5] and found.config["model"] == {"lr": 0.25} and found.exit_code == 0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_fit_that_fails_closes_its_run_as_failed(error, run):
    with pytest.raises(error), tracked(run, None):
        raise error
    (path,) = files_of(run)
    assert WandbFile(path).exit_code == 1


@pytest.mark.parametrize("chosen", [Broken(), [Broken(), Broken()]])
def test_a_users_logger_that_fails_does_not_end_the_fit(chosen, run, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with tracked(run, chosen) as loggers:
        for logger in loggers:
            logger.log_metrics({"train/loss": 0.5}, 0)
            logger.save()
            logger.finalize("success")
    count = len(chosen) if isinstance(chosen, list) else 1
    assert capsys.readouterr().out.count("broken stopped working") == count and len(rows_of(run)) == 1


def test_a_logger_of_the_command_line_is_used(pool, image_folders, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    pool_file = write_yaml(tmp_path / "pools" / "tiny.yaml", pool_config(pool, image_folders))
    own = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=mine"]
    words = fit_words(pool_file, "--name=n", "--id=a", "--trainer.log_every_n_steps=1", *own)
    outcome = command(capfd, "fit", *words)
    assert outcome.code == 0, outcome.err[-2000:]
    ours, theirs = rows_of(Path("runs/n/a")), rows_of(Path("mine/lightning_logs/version_0"))
    assert len(ours) == 3 and ours == theirs and "train/loss" in ours[0]
    assert json.loads(Path("runs/n/a/summary.json").read_text())["status"] == "finished"


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.fixture
def interrupted(tmp_path):
    """A run's folder whose metrics go on past its last checkpoint, at step 4; validation has rows of its own."""
    logger = start_metrics(tmp_path, 0)
    for step in range(6):
        logger.log_metrics({"train/loss": step / 4, "epoch": 0}, step)
        if step == 3:
            logger.log_metrics({"validation/accuracy": 0.5, "epoch": 0}, step)
    logger.save()
    return tmp_path


def test_rows_before_the_step_are_kept_and_later_ones_are_run_again(interrupted):
    before = rows_of(interrupted)
    assert [row["step"] for row in before] == ["0", "1", "2", "3", "3", "4", "5"]
    logger = start_metrics(interrupted, 4)
    assert rows_of(interrupted) == before[:5], "at once: a second kill must not lose them"
    assert rows_of(interrupted)[4]["validation/accuracy"] == "0.5"
    for step in (4, 5, 6):
        logger.log_metrics({"train/loss": 100.0 + step}, step)
    logger.save()
    after = rows_of(interrupted)
    assert after[:5] == before[:5]
    assert [(row["step"], row["train/loss"]) for row in after[5:]] == [("4", "104.0"), ("5", "105.0"), ("6", "106.0")]


def test_a_run_that_begins_again_keeps_no_row(interrupted):
    logger = start_metrics(interrupted, 0)
    logger.log_metrics({"train/loss": 7.0}, 0)
    logger.save()
    assert rows_of(interrupted) == [{"step": "0", "train/loss": "7.0"}]


def test_a_new_run_has_no_file_until_something_is_logged(tmp_path):
    logger = start_metrics(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []
    logger.log_metrics({"train/loss": 1.0}, 0)
    logger.save()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"] and len(rows_of(tmp_path)) == 1
    assert start_metrics(tmp_path / "other", 5) is not None, "metrics that someone removed"
    assert not (tmp_path / "other").exists()


def test_metrics_cut_short_at_any_byte_do_not_end_a_resume(interrupted):
    """What a kill or a full disk leaves of the last write: whole rows are kept."""
    path = interrupted / "metrics.csv"
    whole, rows = path.read_bytes(), rows_of(interrupted)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        complete = whole[:length].count(b"\n") - 1
        start_metrics(interrupted, 4)
        found = rows_of(interrupted) if complete > 0 else []
        assert found[: min(complete, 5)] == rows[: min(max(complete, 0), 5)]
