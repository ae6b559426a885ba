"""A tracker: what a logger is told reaches it, and its failures are said once and end nothing."""

import copy
import json
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from running import command, fit_words, pool_config, without_pictures, write_yaml

from adamerge.training.tracker import Tracker
from adamerge.training.wandb_run import WandbTracker


class Broken(Logger):
    """A logger that can be made, and does nothing else."""

    name, version = "broken", 0

    def __getattribute__(self, name: str):
        if name.startswith(("log_", "save", "finalize", "after_")):
            raise RuntimeError("the service is gone, token=canary")
        return super().__getattribute__(name)

    def log_metrics(self, metrics, step=None) -> None:
        raise NotImplementedError

    def log_hyperparams(self, params, *args, **kwargs) -> None:
        raise NotImplementedError


class Gone:
    """A wandb run whose every use raises."""

    id, name = "broken", "broken"

    def __getattr__(self, name: str):
        raise RuntimeError("the service is gone")


def test_a_tracker_is_its_logger_to_whoever_asks(tmp_path):
    inner = CSVLogger(tmp_path, name="x", version=3)
    tracker = Tracker(inner)
    assert (tracker.name, tracker.version, tracker.save_dir) == ("x", 3, str(tmp_path))
    assert tracker.experiment is inner.experiment and copy.copy(tracker).inner is inner
    tracker.log_metrics({"a": 1.5}, 7)
    tracker.save()
    assert (tmp_path / "x/version_3/metrics.csv").read_text().splitlines() == ["a,step", "1.5,7"]
    with pytest.raises(AttributeError):
        tracker.no_such_thing  # noqa: B018


def test_a_logger_that_raises_is_left_out_and_said_once(capsys):
    tracker = Tracker(Broken())
    tracker.log_metrics({"a": 1.0}, 0)
    tracker.log_hyperparams({})
    tracker.after_save_checkpoint(None)
    tracker.save()
    tracker.finalize("success")
    out = capsys.readouterr().out
    assert (
        out
        == "broken stopped working and is left out from here on (the service is gone, token=…); metrics.csv goes on\n"
    )


def test_wandb_that_raises_does_not_end_a_fit(pool, image_folders, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    pool_file = write_yaml(tmp_path / "pools" / "tiny.yaml", pool_config(pool, image_folders))
    broken = WandbTracker(WandbLogger(experiment=Gone()))
    monkeypatch.setattr("adamerge.training.loggers.start_wandb", lambda folder, settings, own: broken)
    words = fit_words(pool_file, "--name=n", "--id=a", "--trainer.log_every_n_steps=1")
    outcome = command(capfd, "fit", *words)
    assert outcome.code == 0, outcome.err[-2000:]
    assert (outcome.out + outcome.err).count("wandb stopped working") == 1
    assert json.loads(Path("runs/n/a/summary.json").read_text())["status"] == "finished"
    assert len(Path("runs/n/a/metrics.csv").read_text().splitlines()) == 1 + 3
