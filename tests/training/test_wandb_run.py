"""wandb: one run per fit, each with what is its own, and no state of key, server or mode ends a fit."""

import json
import os
import sys
import time
from pathlib import Path

import pytest
import wandb
import yaml
from conftest import CLASSES
from PIL import Image
from running import METHODS, QUICK, child, command, fit_words, pool_config, without_pictures, write_yaml
from wandb_files import WandbFile, files_of, without_users_own
from wandb_server import WandbServer

from adamerge.training.wandb_run import grouped, start_wandb

KEY = "0123456789abcdef" * 2 + "01234567"
NOWHERE = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": KEY}
EVERY = "--trainer.log_every_n_steps=1"


@pytest.fixture
def pool_file(pool, image_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without_users_own(monkeypatch, tmp_path)
    for module in ("adamerge.training.callbacks", "adamerge.runs.fit"):  # small pictures, made at once
        monkeypatch.setattr(f"{module}.draw_heatmap", lambda table, path, *_, **more: Image.new("L", (9, 9)).save(path))
    return write_yaml(tmp_path / "pools" / "tiny.yaml", pool_config(pool, image_folders))


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


def words_of(pool_file: Path, name: str = "n") -> list[str]:
    return fit_words(pool_file, f"--name={name}", "--id=a", EVERY, "--trainer.limit_val_batches=1.0", steps=4)


def status_of(run: Path) -> str:
    return json.loads((run / "summary.json").read_text())["status"]


def check_whole(run: Path) -> WandbFile:
    """The one run of a fit's own folder: closed, with the configuration, metrics, picture and artifact of that fit."""
    (path,) = files_of(run)
    found = WandbFile(path)
    configuration = yaml.safe_load((run / "config.yaml").read_text())
    assert found.config["model"] == configuration["model"] and found.config["id"] == configuration["id"]
    rows = [line.split(",") for line in (run / "metrics.csv").read_text().splitlines()]
    losses = [float(row[rows[0].index("train/loss")]) for row in rows[1:] if row[rows[0].index("train/loss")]]
    assert found.values("train/loss") == pytest.approx(losses, rel=1e-6) and losses
    assert len(found.pictures) == 1 and len(found.values("coefficients/heatmap")) == 1
    (artifact,) = found.artifacts
    (entry,) = artifact.manifest.contents
    assert (entry.path, entry.size) == ("coefficients.safetensors", (run / entry.path).stat().st_size)
    assert found.exit_code == 0
    return found


def test_two_fits_of_one_process_have_a_run_each(pool_file, tmp_path, offline, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["adamerge", "fit", "--data.token=canary-1", "--auth", "canary-2"])
    for name in ("one", "two"):  # runs whose last name is the same
        lr = 0.5 if name == "one" else 0.25
        outcome = command(
            capfd, "fit", *fit_words(pool_file, f"--name={name}", "--id=seed0", EVERY, f"--model.search.lr={lr}")
        )
        assert outcome.code == 0, outcome.err[-2000:]
    assert len(files_of(tmp_path)) == 2 and wandb.run is None
    one, two = check_whole(tmp_path / "runs/one/seed0"), check_whole(tmp_path / "runs/two/seed0")
    assert [own.config["model"]["search"]["init_args"]["lr"] for own in (one, two)] == [0.5, 0.25]
    assert one.values("train/loss")[0] == two.values("train/loss")[0] != one.values("train/loss")[2]
    assert one.values("train/loss")[2] != two.values("train/loss")[2]
    assert one.run.run_id != two.run.run_id and {one.run.run_id, two.run.run_id}.isdisjoint({"seed0", "one", "two"})
    assert (one.run.display_name, two.run.display_name) == ("one/seed0", "two/seed0")
    assert one.run.project == "adamerge" and not one.run.run_group and not two.run.run_group
    for path in (tmp_path / "runs").rglob("*"):
        assert not (path.is_file() and b"canary" in path.read_bytes()), f"a secret of the command line stands in {path}"
    assert sys.argv[2] == "--data.token=canary-1", "the words themselves are still needed"
    assert b"--data.token=" in one.content, "what was given is told, though not its value"


@pytest.fixture
def twice(tmp_path):
    """A method of two stages."""
    entropy = {"class_path": "adamerge.objectives.Entropy"}
    layer_wise = {"class_path": "adamerge.parametrizations.LayerWise", "init_args": {"init": 0.3}}
    model = {"parametrization": layer_wise, "objective": entropy, "search": {"lr": 0.05}}
    for name, lr in (("1_first", 0.05), ("2_second", 0.02)):
        trainer = {"max_steps": 2, "log_every_n_steps": 1}
        write_yaml(tmp_path / "twice" / f"{name}.yaml", {"model": {**model, "search": {"lr": lr}}, "trainer": trainer})
    return tmp_path / "twice"


@pytest.mark.slow
def test_the_stages_of_a_method_are_runs_of_one_group(pool_file, twice, tmp_path, offline, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_NAME", "mine")
    words = ["--config", pool_file, "--config", twice, *QUICK, "--name=n", "--id=a"]
    assert command(capfd, "fit", *words).code == 0
    run = tmp_path / "runs/n/a"
    assert len(files_of(run)) == 2
    first, second = check_whole(run / "1_first"), check_whole(run / "2_second")
    assert first.run.run_group == second.run.run_group and first.run.run_group.startswith("n/a-")
    assert (first.run.display_name, second.run.display_name) == ("mine/1_first", "mine/2_second")
    assert first.run.run_id != second.run.run_id


@pytest.mark.slow
def test_the_fits_of_a_comparison_are_runs_of_one_group(pool_file, twice, tmp_path, offline, capfd):
    """Those of a staged method among them, whatever group the method would have alone."""
    method = METHODS / "adamerging_task_wise.yaml"
    overrides = (*QUICK, EVERY, "--trainer.max_steps=2")
    outcome = command(capfd, "compare", pool_file, method, twice, "--folder", "table", "--lambdas", "0.3", *overrides)
    assert outcome.code == 0, outcome.err[-2000:]
    fits = {path.name.rpartition("-")[0]: path for path in (tmp_path / "table/fits").iterdir()}
    folders = [fits["adamerging_task_wise"], fits["twice"] / "1_first", fits["twice"] / "2_second"]
    assert len(files_of(tmp_path)) == 3
    found = [check_whole(folder) for folder in folders]
    (group,) = {file.run.run_group for file in found}
    assert "/table-" in group and len({file.run.run_id for file in found}) == 3


@pytest.mark.parametrize("project", ["adamerge", "theirs"])
def test_a_fit_that_learns_nothing_has_a_run_too(project, pool_file, tmp_path, offline, capfd):
    """Also where it is a ``WandbLogger`` of the user's."""
    words = fit_words(pool_file, "--name=n", "--id=a", method=METHODS / "task_arithmetic.yaml")
    if project == "theirs":
        words += ["--trainer.logger=lightning.pytorch.loggers.WandbLogger", "--trainer.logger.project=theirs"]
    outcome = command(capfd, "fit", *words)
    assert outcome.code == 0 and "wandb" not in outcome.out, outcome.out + outcome.err[-2000:]
    (path,) = files_of(tmp_path / "runs/n/a")
    found = WandbFile(path)
    assert found.run.project == project
    assert found.config["id"] == "a" and len(found.pictures) == 1 and len(found.artifacts) == 1 and found.exit_code == 0


def started(folder: Path):
    """The record of a run that is begun and closed."""
    folder.mkdir(parents=True, exist_ok=True)
    before = files_of(folder)
    tracker = start_wandb(folder, {})
    assert tracker is not None
    tracker.close(False)
    (path,) = set(files_of(folder)) - set(before)
    return WandbFile(path).run


def test_a_run_keeps_its_id_wherever_it_goes_on(tmp_path, offline, monkeypatch):
    without_users_own(monkeypatch, tmp_path)
    monkeypatch.setenv("WANDB_RUN_ID", "everybodys")
    monkeypatch.chdir(tmp_path)
    first, other = started(Path("runs/a/seed0")).run_id, started(Path("runs/b/seed0")).run_id
    assert first != other and not {first, other} & {"everybodys", "seed0"}
    monkeypatch.chdir(tmp_path / "runs")
    assert started(Path("a/seed0")).run_id == first
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert started(tmp_path / "moved/a/seed0").run_id == first
    assert started(tmp_path / "runs/a/seed0").run_id != first, "another run, at the place that the first one left"


def test_what_the_environment_says_is_heeded(tmp_path, offline, monkeypatch):
    without_users_own(monkeypatch, tmp_path)
    for key, value in {"NAME": "mine", "RUN_GROUP": "ours", "PROJECT": "theirs"}.items():
        monkeypatch.setenv(f"WANDB_{key}", value)
    found = started(tmp_path / "a")
    assert (found.display_name, found.run_group, found.project) == ("mine", "ours", "theirs")
    with grouped(tmp_path):
        found = started(tmp_path / "b")
    assert (found.display_name, found.run_group) == ("mine/b", "ours")


def test_another_run_of_this_process_is_left_alone(tmp_path, offline, monkeypatch):
    """One that a script began before it calls us."""
    without_users_own(monkeypatch, tmp_path)
    with wandb.init(project="p", dir=tmp_path, id="scripts-own") as own:
        assert started(tmp_path / "a").run_id != "scripts-own"
        assert wandb.run is own


@pytest.fixture
def new_service(monkeypatch, tmp_path):
    """wandb reads the environment once a service; this one's ends with the test."""
    without_users_own(monkeypatch, tmp_path)
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.slow
def test_a_server_that_is_away_leaves_an_offline_record(pool_file, tmp_path, new_service, monkeypatch, capfd):
    for name, value in NOWHERE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("adamerge.training.wandb_run.PATIENCE", 2)
    outcome = command(capfd, "fit", *fit_words(pool_file, "--name=n", "--id=a", EVERY))
    assert outcome.code == 0, outcome.err[-2000:]
    assert outcome.out.count("logging offline instead") == 1 and "left out" not in outcome.out
    run = tmp_path / "runs/n/a"
    found = check_whole(run)
    assert found.path.parent.name.startswith("offline-run-")
    assert found.run.run_id == (run / "wandb" / "id").read_text() + "-offline"
    for path in tmp_path.rglob("*"):
        assert not (path.is_file() and KEY.encode() in path.read_bytes()), f"the key stands in {path}"


@pytest.mark.slow
def test_a_server_that_is_away_is_waited_for_once(tmp_path, new_service, monkeypatch):
    for name, value in NOWHERE.items():
        monkeypatch.setenv(name, value)
    wait = {}
    for patience in (1, 4):
        monkeypatch.setattr("adamerge.training.wandb_run.PATIENCE", patience)
        start = time.monotonic()
        assert started(tmp_path / str(patience)).run_id.endswith("-offline")
        wait[patience] = time.monotonic() - start
    assert wait[4] - wait[1] < 3 + 2, "what is waited for is PATIENCE, and not a multiple"


def test_a_server_that_dies_on_the_way_leaves_the_rest_on_disk(tmp_path, new_service, monkeypatch, capsys):
    monkeypatch.setattr("adamerge.training.wandb_run.PATIENCE", 2)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "60")  # a busy machine's server needs more
    server = WandbServer()
    for name, value in {**NOWHERE, "WANDB_BASE_URL": server.url}.items():
        monkeypatch.setenv(name, value)
    tracker = start_wandb(tmp_path, {"lr": 0.25})
    assert tracker is not None
    tracker.log_metrics({"train/loss": 0.5}, 0)
    server.end()
    start = time.monotonic()
    tracker.log_metrics({"train/loss": 0.25}, 1)
    tracker.close(False)
    assert time.monotonic() - start < 2 + 5
    assert "upload the rest with: wandb sync" in capsys.readouterr().out
    (path,) = files_of(tmp_path)
    found = WandbFile(path)
    assert path.parent.name.startswith("run-") and found.run.run_id == (tmp_path / "wandb" / "id").read_text()
    assert found.values("train/loss") == [0.5, 0.25] and found.config["lr"] == 0.25


@pytest.mark.slow
def test_a_real_offline_run_holds_everything_inside_the_runs_folder(pool_file, tmp_path):
    done = child(["-m", "adamerge", "fit", *words_of(pool_file)], tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs/n/a"
    assert status_of(run) == "finished"
    assert [path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("offline-run-*")] == ["runs"]
    found = check_whole(run)
    keys = {key for row in found.history for key in row}
    assert keys >= {"train/loss", "validation/accuracy", "coefficients/heatmap", "coefficients/table"}
    for task in CLASSES:
        assert keys >= {f"train/loss/{task}", f"validation/accuracy/{task}", f"train/top_class_share/{task}"}
    (heatmap,) = found.values("coefficients/heatmap")
    assert heatmap["_type"] == "image-file" and found.pictures[0].stat().st_size > 2000
    (table,) = run.glob("wandb/offline-run-*/files/media/table/**/*.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["group", "expert", "chunk", "coefficient"] and len(content["data"]) > 10
    metadata = json.loads(found.artifacts[0].metadata)
    assert metadata["step"] == 4 and metadata["experts"].keys() == CLASSES.keys() and len(metadata["base"]) == 64


def test_disabled_leaves_nothing(pool_file, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert command(capfd, "fit", *words_of(pool_file)).code == 0
    assert not [path for path in tmp_path.rglob("*wandb*") if path.name != "wandb_cache"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", None])
def test_no_key_and_no_terminal_is_logged_offline(mode, pool_file, tmp_path):
    """Without WANDB_MODE too: what a fresh machine has."""
    start = time.monotonic()
    done = child(["-m", "adamerge", "fit", *words_of(pool_file)], tmp_path, WANDB_MODE=mode)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs/n/a"
    assert status_of(run) == "finished" and list(run.glob("wandb/offline-run-*"))
    assert time.monotonic() - start < 100


KILLER = """
import os, signal
from pathlib import Path
from lightning import Callback

class KillService(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            for place in Path("/proc").iterdir():
                if place.name.isdecimal():
                    try:
                        status = (place / "status").read_text()
                        words = (place / "cmdline").read_text()
                    except OSError:
                        continue
                    if f"PPid:\\t{os.getpid()}\\n" in status and "wandb-core" in words:
                        os.kill(int(place.name), signal.SIGKILL)
                        print("killed wandb's service")
"""


@pytest.mark.slow
def test_a_service_that_dies_on_the_way_does_not_end_the_fit(pool_file, tmp_path):
    (tmp_path / "killer.py").write_text(KILLER)
    words = [*words_of(pool_file), "--trainer.callbacks+=killer.KillService"]
    done = child(["-m", "adamerge", "fit", *words], tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "killed wandb's service" in done.stdout and done.stdout.count("wandb stopped working") == 1
    run = tmp_path / "runs/n/a"
    assert status_of(run) == "finished" and (run / "metrics.csv").read_text().count("\n") >= 5


def test_an_unknown_mode_does_not_end_the_fit(pool_file, tmp_path, capfd, monkeypatch):
    without_pictures(monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    try:
        assert command(capfd, "fit", *words_of(pool_file)).code == 0
    finally:
        os.environ.pop("WANDB_SERVICE", None)
