"""Runs: what a run's folder holds, that no two processes share one, and that a killed run resumes to the same bits."""

import csv
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from running import (
    LAYER_WISE,
    METHODS,
    TASK_ARITHMETIC,
    adam_state,
    child,
    coefficients,
    command,
    environment,
    fit_words,
    pool_config,
    same_coefficients,
    without_pictures,
    write_yaml,
)
from safetensors.torch import load_file, save_file

from adamerge.runs.fit import fit

FILES = {"config.yaml", "environment.json", "coefficients.safetensors", "metrics.csv", "summary.json", "heatmap.png"}


def steps_of(run: Path, column: str = "train/loss") -> list[int]:
    with (run / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get(column)]


def status_of(run: Path) -> str:
    return json.loads((run / "summary.json").read_text())["status"]


def test_the_folder_holds_what_the_house_promises(pool_file, capfd):
    outcome = command(capfd, "fit", *fit_words(pool_file, "--id=a", "--trainer.limit_val_batches=1.0"))
    run = Path("runs/tiny-adamerging_layer_wise/a")
    assert outcome.code == 0 and str(run) in outcome.out
    visible = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert visible == FILES | {"checkpoints"}
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["step"]) == ("finished", 3) and summary["seconds"] > 0
    assert summary["metrics"].keys() >= {"train/loss", "train/loss/colours", "validation/accuracy/shapes"}
    assert summary["protocol"]["transductive"] is False
    recorded = json.loads((run / "environment.json").read_text())
    assert recorded["threads"] == torch.get_num_threads() and recorded["torch"] == torch.__version__
    assert not [path for path in run.rglob("*") if ".adamerge-" in path.name], "temporary files are left"


def test_names_of_runs(pool_file):
    by_default = fit(fit_words(pool_file))
    assert by_default.parent.name == "tiny-adamerging_layer_wise"
    named = fit(fit_words(pool_file, "--name=mine", "--id=one", "--runs=elsewhere", method=TASK_ARITHMETIC))
    assert named == Path("elsewhere/mine/one")


def test_the_config_file_of_a_run_repeats_it(pool_file):
    first = fit(fit_words(pool_file, "--id=a", "--model.search.lr=0.01"))
    again = fit(["--config", str(first / "config.yaml"), "--id=b", "--trainer.enable_progress_bar=false"])
    assert again != first and same_coefficients(first, again)
    assert yaml.safe_load((again / "config.yaml").read_text())["model"]["search"]["init_args"]["lr"] == 0.01


@pytest.mark.slow
def test_the_plan_is_printed_and_its_choice_is_what_a_resumed_run_goes_by(pool_file, capfd, monkeypatch):
    """On a machine with less memory by then, reading from disk would give other bits."""
    from adamerge.task_vectors.memory import Available

    monkeypatch.setattr(Available, "on", classmethod(lambda cls, device, processes=None: cls(1 << 40, 0)))
    outcome = command(capfd, "fit", *fit_words(pool_file, "--id=a"))
    assert "Resident(float32)" in outcome.out and "Activations come on top" in " ".join(outcome.out.split())
    run = Path("runs/tiny-adamerging_layer_wise/a")
    told = {"class_path": "adamerge.Resident", "init_args": {"dtype": "float32"}}
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["storage"] == told
    plan = json.loads((run / "summary.json").read_text())["plan"]
    assert plan["storage"] == "Resident(float32)" and plan["predicted_peak"]["Disk()"]["host"] > plan["merged_copy"]
    assert (plan["copy"], plan["processes"], plan["running"]) == ("WholeCopy", 1, 0)
    monkeypatch.setattr(Available, "on", classmethod(lambda cls, device, processes=None: cls(1000, 0)))
    again = command(capfd, "fit", "--resume", run)
    assert again.code == 0 and "no, chosen" in again.out and "warning: not even" in again.out
    blocks = fit(fit_words(pool_file, "--id=c", "--model.copy=BlockCopy"))
    found = json.loads((blocks / "summary.json").read_text())["plan"]
    assert found["copy"] == "BlockCopy" and found["running"] > 0 and found["gradient"] < plan["gradient"]
    assert json.loads((run / "summary.json").read_text())["plan"]["storage"] == "Resident(float32)"
    other = fit(fit_words(pool_file, "--id=b"))
    assert yaml.safe_load((other / "config.yaml").read_text())["model"]["storage"]["class_path"] == "adamerge.Disk"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "share"),
    [(["--model.storage=Disk"], 1e-3), (["--model.storage=LowBit", "--model.storage.bits=8"], 0.05)],
)
def test_a_storage_is_one_switch(pool_file, words, share):
    """With plain descent, whose steps are as large as gradients are: Adam's would all be of one size."""
    descent = ["--model.search.optimizer=torch.optim.SGD", "--model.search.lr=0.5"]
    run = fit(fit_words(pool_file, "--id=a", *descent, *words))
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["storage"]["class_path"].endswith(words[0][16:])
    exact = coefficients(fit(fit_words(pool_file, "--id=b", *descent)))
    moved = max(float((value - 0.3).abs().max()) for value in exact.values())
    assert moved > 1e-4
    assert all((coefficients(run)[name] - value).abs().max() <= share * moved for name, value in exact.items())


@pytest.mark.slow
def test_transductive_calibration_is_told_in_summary_and_card(pool_file, capfd):
    for name, transductive in (("a", False), ("b", True)):
        run = fit(fit_words(pool_file, f"--id={name}", f"--data.transductive={str(transductive).lower()}"))
        assert json.loads((run / "summary.json").read_text())["protocol"]["transductive"] is transductive
        assert command(capfd, "export", run / "coefficients.safetensors", name).code == 0
        split = "test" if transductive else "calibration"
        card = (Path(name) / "README.md").read_text()
        assert f"- transductive: {transductive}" in card and f"- calibration_split: {split}, labels never read" in card


@pytest.mark.slow
def test_configs_in_either_order_give_the_same_coefficients(pool_file):
    words = fit_words(pool_file, "--model.search.lr=0.01")
    swapped = [*words[2:4], *words[:2], *words[4:]]
    assert same_coefficients(fit([*words, "--id=a"]), fit([*swapped, "--id=b"]))


def test_an_id_is_used_once(pool_file, capfd):
    words = fit_words(pool_file, "--id=a")
    assert command(capfd, "fit", *words).code == 0
    run = Path("runs/tiny-adamerging_layer_wise/a")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    outcome = command(capfd, "fit", *words)
    assert outcome.code == 2 and "holds a run already" in outcome.error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_run_in_use_is_refused_with_its_holder(pool_file, tmp_path, capfd):
    run = fit(fit_words(pool_file, "--id=a"))
    code = (
        "import sys, pathlib\nfrom adamerge.runs.run_folders import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('locked', flush=True); sys.stdin.read()"
    )
    line = [sys.executable, "-c", code, str(run)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as holder:
        try:
            assert holder.stdout.readline() == b"locked\n"
            outcome = command(capfd, "fit", "--resume", run)
            assert outcome.code == 2 and f"process {holder.pid} on" in outcome.error
        finally:
            holder.stdin.close()
    assert command(capfd, "fit", "--resume", run).code == 0, "the lock outlived its holder"


def test_resuming_a_finished_run_is_harmless(pool_file, capfd):
    run = fit(fit_words(pool_file, "--id=a", "--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=1.0"))
    before = {name: (run / name).read_bytes() for name in ("coefficients.safetensors", "metrics.csv", "config.yaml")}
    outcome = command(capfd, "fit", "--resume", run)
    assert outcome.code == 0, outcome.err[-2000:]
    assert {name: (run / name).read_bytes() for name in before} == before
    assert status_of(run) == "finished"


def test_a_run_killed_after_its_last_checkpoint_still_gets_its_coefficients(pool_file, capfd):
    """The last checkpoint is written before the coefficient file: a kill in between must not lose the result."""
    run = fit(fit_words(pool_file, "--id=a"))
    kept = coefficients(run)
    (run / "coefficients.safetensors").unlink()
    (run / "summary.json").write_text(json.dumps({"status": "running", "step": 0}))
    assert command(capfd, "fit", "--resume", run).code == 0
    assert status_of(run) == "finished"
    assert all(torch.equal(value, kept[name]) for name, value in coefficients(run).items())


def test_resume_refuses_overrides_and_strange_folders(pool_file, tmp_path, capfd):
    run = fit(fit_words(pool_file, "--id=a"))
    outcome = command(capfd, "fit", "--resume", run, "--model.search.lr=3")
    assert outcome.code == 2 and "--model.search.lr=3" in outcome.error
    outcome = command(capfd, "fit", "--resume", tmp_path)
    assert outcome.code == 2 and "config.yaml" in outcome.error


def test_resume_under_other_threads_needs_a_flag(pool_file, capfd):
    run = fit(fit_words(pool_file, "--id=a", "--trainer.log_every_n_steps=1"))
    path = run / "environment.json"
    recorded = json.loads(path.read_text())
    path.write_text(json.dumps({**recorded, "threads": 77}))
    before = (run / "coefficients.safetensors").read_bytes(), (run / "metrics.csv").read_bytes()
    outcome = command(capfd, "fit", "--resume", run)
    assert outcome.code == 2 and "threads" in outcome.error
    assert "77" in outcome.err and str(torch.get_num_threads()) in outcome.err, "both values are named"
    assert ((run / "coefficients.safetensors").read_bytes(), (run / "metrics.csv").read_bytes()) == before
    assert command(capfd, "fit", "--resume", run, "--allow-resume-difference").code == 0


def test_resume_with_another_expert_under_the_same_name_needs_a_flag(pool_file, pool, tmp_path, capfd):
    moved = tmp_path / "colours.safetensors"
    moved.write_bytes(Path(pool["experts"]["colours"]).read_bytes())
    run = fit(fit_words(pool_file, "--id=a", f"--model.task_vectors.experts.colours={moved}"))
    changed = load_file(moved)
    changed["visual.proj"] += 1
    save_file(changed, moved)
    before = (run / "coefficients.safetensors").read_bytes()
    outcome = command(capfd, "fit", "--resume", run)
    assert outcome.code == 2 and "models changed" in outcome.error and "expert 'colours'" in outcome.err
    assert "the base" not in outcome.err and (run / "coefficients.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "damage", ["truncated", *(pytest.param(how, marks=pytest.mark.slow) for how in ("zeroed", "garbage", "empty"))]
)
def test_a_corrupt_checkpoint_falls_back_to_the_one_before(damage, pool_file, capfd):
    run = fit(fit_words(pool_file, "--id=a", steps=4))
    whole = fit(fit_words(pool_file, "--id=b", steps=4))
    content = (run / "checkpoints" / "last.ckpt").read_bytes()
    broken = {"truncated": content[:-50], "zeroed": bytes(len(content)), "garbage": b"\x07" * 999, "empty": b""}[damage]
    for name in ("last.ckpt", "step=4.ckpt"):
        (run / "checkpoints" / name).write_bytes(broken)
    (run / "coefficients.safetensors").unlink()
    outcome = command(capfd, "fit", "--resume", run)
    assert outcome.code == 0, outcome.err[-2000:]
    assert "last.ckpt" in outcome.out + outcome.err, "a notice names the file"
    assert same_coefficients(run, whole)


def test_no_readable_checkpoint_is_an_error(pool_file, capfd):
    run = fit(fit_words(pool_file, "--id=a"))
    for path in (run / "checkpoints").glob("*.ckpt"):
        path.write_bytes(b"PK\x03\x04 nothing")
    outcome = command(capfd, "fit", "--resume", run)
    assert outcome.code == 3 and "checkpoints" in outcome.error


def test_a_run_killed_before_its_first_checkpoint_starts_over(pool_file, capfd):
    run = fit(fit_words(pool_file, "--id=a"))
    kept = coefficients(run)
    for path in [*(run / "checkpoints").iterdir(), run / "coefficients.safetensors", run / "summary.json"]:
        path.unlink()
    assert command(capfd, "fit", "--resume", run).code == 0
    assert all(torch.equal(value, kept[name]) for name, value in coefficients(run).items())


def test_a_checkpoint_that_would_run_code_is_not_opened(pool_file, tmp_path, capfd):
    run = fit(fit_words(pool_file, "--id=a"))

    class Evil:
        def __reduce__(self):
            return Path.write_text, (tmp_path / "canary", "code ran")

    for path in (run / "checkpoints").glob("*.ckpt"):
        torch.save({"global_step": Evil(), "state_dict": {}}, path)
    assert command(capfd, "fit", "--resume", run).code == 3
    assert not (tmp_path / "canary").exists()


def test_checkpoints_are_small(pool_file):
    run = fit(fit_words(pool_file, "--id=a"))
    held = sum(value.numel() * 4 for value in coefficients(run).values())
    for path in (run / "checkpoints").glob("*.ckpt"):
        assert path.stat().st_size <= 10 * held + 64 * 1024
        assert torch.load(path, weights_only=True)["state_dict"].keys() == {"merged.parametrization.w"}


def test_warm_start(pool_file, capfd):
    first = fit(fit_words(pool_file, "--id=a", "--model.search.lr=0.05"))
    start = f"--model.init_from={first / 'coefficients.safetensors'}"
    second = fit(fit_words(pool_file, "--id=b", start, "--model.objective=null", steps=1))
    assert same_coefficients(first, second)
    task_wise = METHODS / "adamerging_task_wise.yaml"
    outcome = command(capfd, "fit", *fit_words(pool_file, "--id=c", start, method=task_wise))
    assert outcome.code == 3 and "coefficients.safetensors" in outcome.error
    assert not Path("runs/tiny-adamerging_task_wise").exists()


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "weight_average"])
def test_a_method_without_objective_opens_no_data(method, pool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    images = dict.fromkeys(pool["experts"], str(tmp_path / "no_such_images"))
    file = write_yaml(tmp_path / "pool.yaml", pool_config(pool, images))
    run = fit(["--config", str(file), "--config", str(METHODS / f"{method}.yaml"), "--id=a"])
    (values,) = coefficients(run).values()
    expected = 0.5 if method == "weight_average" else 0.3
    assert torch.equal(values, torch.full((2, 1), expected)) and status_of(run) == "finished"
    again = fit([], resume=run)
    assert again == run and torch.equal(*coefficients(run).values(), torch.full((2, 1), expected))


SLOW_POOL = """
import sys, time
import adamerge.data.base as base
from adamerge.cli import main
plain = base.Steps.__getitem__
def slow(self, step):
    time.sleep(0.12)
    return plain(self, step)
base.Steps.__getitem__ = slow
sys.exit(main(sys.argv[1:]))
"""


class Fits:
    """Fits in children, slow enough to be killed at any step."""

    def __init__(self, folder: Path, pool_file: Path, steps: int) -> None:
        self.folder, self.script = folder, folder / "slow.py"
        self.script.write_text(SLOW_POOL)
        words = fit_words(pool_file, "--trainer.log_every_n_steps=1", "--model.search.lr=0.01", steps=steps)
        self.words = [sys.executable, str(self.script), "fit", *words, "--name=soak"]

    def run(self, name: str) -> Path:
        return self.folder / "runs" / "soak" / name

    def start(self, name: str) -> subprocess.Popen:
        resume = (self.run(name) / "config.yaml").exists()
        line = [*self.words[:3], "--resume", str(self.run(name))] if resume else [*self.words, f"--id={name}"]
        # a shell's background job ignores interrupts, and what it starts would too
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                line, cwd=self.folder, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        finally:
            signal.signal(signal.SIGINT, before)

    def until_step(self, name: str, step: int, process: subprocess.Popen) -> None:
        end = time.monotonic() + 100
        while process.poll() is None and time.monotonic() < end:
            names = [path.stem for path in (self.run(name) / "checkpoints").glob("step=*.ckpt")]
            if any(int(found.partition("=")[2]) >= step for found in names):
                return
            time.sleep(0.02)


@pytest.fixture
def fits(tmp_path, pool_file):
    return Fits(tmp_path, pool_file, steps=24)


def soak(fits: Fits, stops: list[int]) -> None:
    """An uninterrupted fit, and one killed after each of these steps, end in the same bits."""
    whole = fits.start("whole")
    for stop in stops:
        process = fits.start("killed")
        fits.until_step("killed", stop, process)
        time.sleep(random.uniform(0, 0.3))  # anywhere in the steps after it, writing included
        process.send_signal(signal.SIGKILL)
        _, error = process.communicate()
        assert process.returncode == -signal.SIGKILL, error[-2000:]
    last = fits.start("killed")
    assert last.communicate() and last.returncode == 0
    assert whole.communicate() and whole.returncode == 0
    one, other = fits.run("whole"), fits.run("killed")
    assert (one / "coefficients.safetensors").read_bytes() == (other / "coefficients.safetensors").read_bytes()
    left, right = adam_state(one), adam_state(other)
    assert left["step"] == right["step"] and left.keys() == right.keys() >= {"exp_avg", "exp_avg_sq"}
    assert all(torch.equal(torch.as_tensor(left[key]), torch.as_tensor(right[key])) for key in left)
    assert steps_of(one) == steps_of(other) == list(range(24)), "every step is in metrics.csv, once"
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    assert not [path for path in other.rglob("*") if ".adamerge-" in path.name], "leftovers of the killed are swept"


@pytest.mark.slow
def test_a_killed_fit_resumes_to_the_same_bits(fits):
    soak(fits, [11])


@pytest.mark.slow
def test_a_fit_killed_five_times_resumes_to_the_same_bits(fits):
    soak(fits, sorted(random.sample(range(2, 22), 5)))


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_fit_keeps_its_last_step_and_resumes_to_the_same_bits(sent, code, tmp_path, pool_file):
    """Checkpoints are 10 steps apart; what was finished after the last one is not lost."""
    fits = Fits(tmp_path, pool_file, steps=100)
    whole, process = fits.start("whole"), fits.start("a")
    fits.until_step("a", 20, process)
    time.sleep(random.uniform(0.3, 0.9))
    process.send_signal(sent)
    _, error = process.communicate(timeout=60)
    run = fits.run("a")
    assert process.returncode == code, error[-2000:]
    assert "Traceback" not in error and status_of(run) == "interrupted"
    ended = json.loads((run / "summary.json").read_text())["step"]
    assert adam_state(run)["step"] == ended and ended % 10, "between two checkpoints"
    again = fits.start("a")
    assert again.communicate() and again.returncode == 0 and status_of(run) == "finished"
    assert whole.communicate() and whole.returncode == 0
    kept = (fits.run("whole") / "coefficients.safetensors").read_bytes()
    assert (run / "coefficients.safetensors").read_bytes() == kept and steps_of(run) == list(range(100))


@pytest.mark.slow
def test_metrics_survive_a_kill_between_checkpoints(pool_file, tmp_path):
    """What was logged before the checkpoint that a run resumes from must be in the file when the process dies."""
    code = (
        "import os, sys\nimport lightning\nfrom adamerge.cli import main\nfrom adamerge.runs import summary\n"
        "def die(self, trainer, module, *_):\n    trainer.global_step == 7 and os.kill(os.getpid(), 9)\n"
        "summary.Summary.on_train_batch_end = die\nmain(sys.argv[1:])"
    )
    words = fit_words(pool_file, "--id=a", "--name=n", "--trainer.log_every_n_steps=1", steps=10)
    assert child(["-c", code, "fit", *words], tmp_path).returncode == -signal.SIGKILL
    run = fit([], resume=tmp_path / "runs/n/a", allow_resume_difference=True)
    assert steps_of(run) == list(range(10))


def test_the_methods_are_there():
    assert LAYER_WISE.is_file() and TASK_ARITHMETIC.is_file()
