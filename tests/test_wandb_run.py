"""wandb: what an offline run holds, and that no state of key, server or mode ends a fit."""

import json
import os
import struct
import time
from pathlib import Path

import pytest
from conftest import CLASSES
from running import child, command, fit_words, pool_config, without_pictures, write_yaml
from wandb.proto import wandb_internal_pb2

KEYS = ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_PROJECT", "WANDB_DIR")


@pytest.fixture
def pool_file(pool, image_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    # no key of the user's, and nothing left in the user's folders
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb_cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "wandb_data"))
    return write_yaml(tmp_path / "pools" / "tiny.yaml", pool_config(pool, image_folders))


def words_of(pool_file: Path) -> list[str]:
    return fit_words(
        pool_file, "--name=n", "--id=a", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=1.0", steps=4
    )


def records(run: Path) -> list[wandb_internal_pb2.Record]:
    """Every record of the run's .wandb file: LevelDB's log format, blocks of 32 KiB that records may cross."""
    (path,) = run.glob("wandb/offline-run-*/run-*.wandb")
    content, place, found, parts = path.read_bytes(), 7, [], b""
    assert content.startswith(b":W&B")
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


def history_of(found: list[wandb_internal_pb2.Record]) -> list[dict]:
    """One dictionary a step; media, which take several keys, become a dictionary in it."""
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            rows.append({})
            for item in record.history.item:
                first, *rest = [item.key] if item.key else item.nested_key
                value = json.loads(item.value_json)
                if rest:
                    rows[-1].setdefault(first, {})["/".join(rest)] = value
                else:
                    rows[-1][first] = value
    return rows


def status_of(run: Path) -> str:
    return json.loads((run / "summary.json").read_text())["status"]


def test_an_offline_run_holds_everything_inside_the_runs_folder(pool_file, tmp_path):
    done = child(["-m", "adamerge", "fit", *words_of(pool_file)], tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs/n/a"
    assert status_of(run) == "finished"
    assert [path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("offline-run-*")] == ["runs"]
    found = records(run)
    rows = history_of(found)
    keys = {key for row in rows for key in row}
    assert keys >= {"train/loss", "validation/accuracy", "coefficients/heatmap", "coefficients/table"}
    for task in CLASSES:
        assert keys >= {f"train/loss/{task}", f"validation/accuracy/{task}", f"train/top_class_share/{task}"}
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 4
    (heatmap,) = [row["coefficients/heatmap"] for row in rows if "coefficients/heatmap" in row]
    assert heatmap["_type"] == "image-file"
    pictures = list(run.glob("wandb/offline-run-*/files/media/images/**/*.png"))
    assert len(pictures) == 1 and pictures[0].stat().st_size > 2000
    (table,) = run.glob("wandb/offline-run-*/files/media/table/**/*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["group", "expert", "chunk", "coefficient"] and len(content["data"]) > 10
    artifacts = [record.request.log_artifact.artifact for record in found if record.HasField("request")]
    artifacts += [record.artifact for record in found if record.HasField("artifact")]
    (artifact,) = [artifact for artifact in artifacts if artifact.type == "merge-coefficients"]
    metadata = json.loads(artifact.metadata)
    assert metadata["step"] == 4 and metadata["experts"].keys() == CLASSES.keys() and len(metadata["base"]) == 64
    assert [entry.path for entry in artifact.manifest.contents] == ["coefficients.safetensors"]


@pytest.mark.slow
def test_the_settings_of_the_run_are_in_it(pool_file, tmp_path):
    """A table of runs is of use only when it can be sorted by what was set."""
    done = child(["-m", "adamerge", "fit", *words_of(pool_file), "--model.lr=0.0123"], tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "0.0123" in str([(record.config, record.run.config) for record in records(tmp_path / "runs/n/a")])


def test_disabled_leaves_nothing(pool_file, tmp_path, capfd, monkeypatch):
    without_pictures(monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert command(capfd, "fit", *words_of(pool_file)).code == 0
    assert not [path for path in tmp_path.rglob("*wandb*") if path.name != "wandb_cache"]


@pytest.mark.parametrize("mode", [pytest.param("online", marks=pytest.mark.slow), None])
def test_no_key_and_no_terminal_is_logged_offline(mode, pool_file, tmp_path):
    """Without WANDB_MODE too: what a fresh machine has."""
    start = time.monotonic()
    done = child(["-m", "adamerge", "fit", *words_of(pool_file)], tmp_path, WANDB_MODE=mode)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs/n/a"
    assert status_of(run) == "finished" and list(run.glob("wandb/offline-run-*"))
    assert time.monotonic() - start < 100


@pytest.mark.slow
def test_an_unreachable_server_costs_less_than_a_minute(pool_file, tmp_path):
    key = "0123456789abcdef" * 2 + "01234567"
    seconds = {}
    for name, changes in (
        ("disabled", {"WANDB_MODE": "disabled"}),
        ("online", {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": key}),
    ):
        words = [word.replace("--id=a", f"--id={name}") for word in words_of(pool_file)]
        start = time.monotonic()
        done = child(["-m", "adamerge", "fit", *words], tmp_path, timeout=250, **changes)
        seconds[name] = time.monotonic() - start
        assert done.returncode == 0, done.stderr[-2000:]
        assert status_of(tmp_path / "runs/n" / name) == "finished"
    print(f"wandb unreachable: {seconds}")
    assert seconds["online"] - seconds["disabled"] < 60
    for path in tmp_path.rglob("*"):
        assert not (path.is_file() and key.encode() in path.read_bytes()), f"the key stands in {path}"


def test_an_unknown_mode_does_not_end_the_fit(pool_file, tmp_path, capfd, monkeypatch):
    without_pictures(monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    try:
        assert command(capfd, "fit", *words_of(pool_file)).code == 0
    finally:
        os.environ.pop("WANDB_SERVICE", None)
