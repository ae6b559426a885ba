"""Tracking: a failing tracker is left out, no secret is logged, and metrics of steps that are run again are dropped."""

import csv
import json
from pathlib import Path

import pytest
from running import METHODS, command, fit_words, pool_config, without_pictures, write_yaml
from yaml import safe_load

from adamerge.tracking import PatientWandb, redacted, start_metrics


@pytest.fixture
def pool_file(pool, image_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    return write_yaml(tmp_path / "pools" / "tiny.yaml", pool_config(pool, image_folders))


class Broken:
    """A wandb run whose every use raises."""

    id, name = "broken", "broken"

    def __getattr__(self, name: str):
        raise RuntimeError("the service is gone")


def test_a_tracker_that_raises_is_left_out_and_said_once(pool_file, monkeypatch, capfd):
    monkeypatch.setattr("adamerge.runs.start_wandb", lambda folder, settings: PatientWandb(experiment=Broken()))
    words = fit_words(pool_file, "--name=n", "--id=a", "--trainer.log_every_n_steps=1")
    outcome = command(capfd, "fit", *words)
    assert outcome.code == 0, outcome.err[-2000:]
    assert (outcome.out + outcome.err).count("wandb stopped working") == 1
    assert json.loads(Path("runs/n/a/summary.json").read_text())["status"] == "finished"
    assert len(Path("runs/n/a/metrics.csv").read_text().splitlines()) == 1 + 3


HEX = "0123456789abcdef"

SECRETS = {  # settings, and the part of them that nobody may see
    "a key by its name": ({"api_key": "canary-01"}, "canary-01"),
    "a token by its name": ({"hub_token": "canary-02"}, "canary-02"),
    "a password by its name": ({"PASSWORD": "canary-03"}, "canary-03"),
    "a secret by its name": ({"model": {"init_args": {"clientSecret": "canary-04"}}}, "canary-04"),
    "a credential by its name": ({"aws_credential": "canary-05"}, "canary-05"),
    "a token of the hub": ({"base": "hf_" + "canaryABCDEFGHIJ" * 2}, "canaryABCDEFGHIJ"),
    "a key of wandb": ({"note": f"see {(HEX * 3)[:40]}"}, HEX),
    "a key of an API": ({"endpoint": "sk-canary0123456789ABCDEF"}, "canary0123456789"),
    "a user in a URL": ({"cache": "https://canary-09@host/path"}, "canary-09"),
    "a password in a URL": ({"proxy": "http://me:canary-10@host:8080/"}, "canary-10"),
    "in a list in a list": ({"experts": [["fine", ["hf_canary00000011"]], {"x": ["y"]}]}, "canary00000011"),
    "in a tuple, inside a text": ({"words": ("--url=s3://me:canary-12@host/a, then on",)}, "canary-12"),
    "a list of tokens by its name": ({"tokens": ["canary-13"]}, "canary-13"),
    "credentials of several parts": ({"credentials": {"user": "me", "value": "canary-14"}}, "canary-14"),
    "a key of an API, of today": ({"endpoint": "sk-proj-canary15_ABCDEFGHIJKL"}, "canary15"),
}


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_not_logged(name):
    settings, canary = SECRETS[name]
    assert canary in str(settings)
    found = redacted(settings)
    assert canary not in str(found) and "…" in str(found)
    assert found.keys() == settings.keys(), "what is set is told, though not to what"
    assert canary in str(settings), "the settings themselves are still needed"


def test_what_stands_beside_a_secret_is_kept():
    settings = {"url": "https://me:pw@host/path", "token": "x", "lr": 0.01, "experts": ["hf_abcdefghijkl", "cars"]}
    found = redacted(settings)
    assert found == {"url": "https://…host/path", "token": "…", "lr": 0.01, "experts": ["…", "cars"]}


ORDINARY = {
    "a task": "cars",
    "a path": "/data/models/vit-b-32/cars/model.safetensors",
    "a path at home": "~/models/dtd.safetensors",
    "a hub id": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "a URL": "https://host.example/path/file?x=1",
    "a fingerprint": HEX * 4,
    "a short hash": "d22343b",
    "patterns": ["visual.*", "*.token_embedding.weight", "*.k_proj.bias"],
    "numbers": [1, 0.3, 1e-3, True, None, -1],
    "nothing": {},
    "a class": {"class_path": "adamerge.parametrizations.LayerWise", "init_args": {"init": 0.3}},
    "templates": ["a photo of {}.", "the {} sign"],
    "a method": "configs/methods/task-arithmetic.yaml",
    "a tokenizer": {"tokenizer": "openai/clip-vit-base-patch32"},
    "a folder of the hub's": "/scratch/hf_datasets_cache/cars",
    "a disk": "/mnt/disk-evaluations/runs",
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_values_are_logged_as_they_are(name):
    assert redacted({"value": ORDINARY[name]}) == {"value": ORDINARY[name]}


def test_the_shipped_configurations_hold_nothing_that_looks_like_a_secret():
    for path in METHODS.parent.rglob("*.yaml"):
        settings = safe_load(path.read_text(encoding="utf-8"))
        assert redacted(settings) == settings, path


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
