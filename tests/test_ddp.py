"""Two processes: the same coefficients on both, and the same as one process finds on the same batches."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rounding import gamma
from running import child, coefficients, environment, fit_words, pool_config, write_yaml
from safetensors.torch import load_file, save_file
from toy_points import ROUNDINGS, WIDTH

SCRIPT = """
import json, os, sys
from functools import partial
import torch
from lightning import Trainer
from torch.optim import SGD
from adamerge import (
    Descent, DistanceToInitial, Disk, Entropy, ImageCalibration, ImageTask, LayerWise, Merging, MergingModule,
    OpenClipClassifier, Resident, TaskVectors,
)

given = json.loads(sys.argv[1])
torch.set_num_threads(1)
pool = given["pool"]
tasks = {task: ImageTask(folder, ["a photo of {}"]) for task, folder in given["images"].items()}
data = ImageCalibration(tasks=tasks, batch_size=given["batch_size"])
vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"])
penalty = DistanceToInitial(0.5, 2.0) if given["penalty"] else None
module = MergingModule(Merging(
    backbone=OpenClipClassifier(pool["base"]), task_vectors=vectors, parametrization=LayerWise, objective=Entropy(),
    search=Descent(partial(SGD, lr=1.0), 0.5), penalty=penalty, micro_batch=given["micro_batch"],
    storage=Disk() if "LOCAL_RANK" in os.environ else Resident(),
))
parallel = {"devices": 2, "strategy": "ddp"} if given["devices"] == 2 else {"devices": 1}
trainer = Trainer(
    max_steps=4, max_epochs=1, accelerator="cpu", use_distributed_sampler=False, logger=False, limit_val_batches=0,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **parallel,
)
trainer.fit(module, data)
assert str(module.merged.storage) == "Resident(float32)", "what the first process chose is for all"
w = module.merged.parametrization.w.detach()
torch.save((w, dict(trainer.callback_metrics)), f"{given['out']}_{trainer.global_rank}.pt")
"""


def fitted(folder: Path, pool, images, name: str, **settings) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Of each process: its coefficients, and the figures that it logged of the last step."""
    script = folder / "fit.py"
    script.write_text(SCRIPT)
    given = {"pool": pool, "images": images, "out": name, "batch_size": 6, "penalty": False, "micro_batch": None}
    done = child([script, json.dumps({**given, **settings})], folder, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(path, weights_only=True) for path in sorted(folder.glob(f"{name}_*.pt"))]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.slow),
        # uneven ranks: 4 and 3 of 7 samples, in micro-batches, with a penalty that must not count twice
        pytest.param({"batch_size": 7, "micro_batch": 3, "penalty": True}, marks=pytest.mark.slow),
    ],
    ids=["even", "uneven"],
)
def test_two_processes_find_what_one_finds(settings, pool, image_folders, tmp_path):
    ((alone, expected),) = fitted(tmp_path, pool, image_folders, "alone", devices=1, **settings)
    (first, figures), (second, others) = fitted(tmp_path, pool, image_folders, "both", devices=2, **settings)
    assert torch.equal(first, second), "the ranks drifted apart"
    assert (alone - 0.3).abs().max() > 1e-4, "something was learned"
    assert (first - alone).abs().max() <= 1e-6
    assert figures == others, "each rank tells of its own samples"
    assert figures.keys() == expected.keys() >= {"train/loss", "train/loss/colours", "train/top_class_share/shapes"}
    for name, value in expected.items():
        assert (figures[name] - value).abs() <= 1e-5 * value.abs().clamp_min(1), name


@pytest.mark.slow
def test_two_processes_that_read_other_files_end_with_an_error_that_names_one(pool, image_folders, tmp_path):
    """Each machine has a folder of its own, and in one of them is another expert under the same name."""
    weights = load_file(pool["experts"]["colours"])
    weights["visual.proj"] += 1
    save_file(weights, tmp_path / "other.safetensors")
    script = tmp_path / "fit.py"
    path = str(tmp_path / "other.safetensors")
    other = f"if os.environ.get('LOCAL_RANK') == '1':\n    pool['experts']['colours'] = {path!r}\n"
    script.write_text(SCRIPT.replace("tasks = {", other + "tasks = {", 1))
    given = {"pool": pool, "images": image_folders, "out": "a", "batch_size": 6, "penalty": False, "micro_batch": None}
    done = child([script, json.dumps({**given, "devices": 2})], tmp_path, timeout=200)
    assert done.returncode != 0 and "process 1 has another expert 'colours' than process 0" in done.stderr
    assert not list(tmp_path.glob("a_*.pt"))


MASKS = """
import json, sys
from functools import partial
sys.path.insert(0, sys.argv[1])
import torch
from lightning import Trainer
from torch.optim import SGD
from toy_points import QUIET, ToyClassifier, ToyPoints, vectors_of
from modules import bilevel
from adamerge.objectives import Entropy
from adamerge.parametrizations import Concrete, LayerWise
from adamerge.training.search_step import SearchStep

torch.set_num_threads(1)
found = []
module = bilevel(
    ToyClassifier(), vectors_of(), partial(Concrete, inner=LayerWise), Entropy(), lr=1.0, inner_lr=0.2,
    optimizer=partial(SGD, lr=1.0), inner_optimizer=partial(SGD, lr=1.0), micro_batch=3,
)
gradients = SearchStep.gradients

def watched(step, evaluation, parameters):
    gradients(step, evaluation, parameters)
    found.append([parameter.grad.clone() for parameter in parameters])

SearchStep.gradients = watched
parallel = {"devices": 2, "strategy": "ddp"} if sys.argv[3] == "2" else {"devices": 1}
trainer = Trainer(**QUIET, max_steps=2, max_epochs=1, **parallel)
trainer.fit(module, ToyPoints(batch_size=12))
torch.save((found, dict(module.merged.parametrization.state_dict())), f"{sys.argv[2]}_{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_find_the_masks_that_one_finds(tmp_path):
    """Of twelve samples a task each rank has six, its halves three: together they are the halves of one process."""
    (tmp_path / "fit.py").write_text(MASKS)
    for name, devices in (("alone", 1), ("both", 2)):
        done = child([tmp_path / "fit.py", Path(__file__).parent, name, devices], tmp_path, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, first, second = (torch.load(tmp_path / f"{n}.pt") for n in ("alone_0", "both_0", "both_1"))
    assert len(alone[0]) == len(first[0]) == 4, "an inner and an outer gradient in each of two steps"
    for one, both in zip(alone[0][:2], first[0][:2], strict=True):  # later ones are of points that rounding moved
        largest = max(float(gradient.abs().max()) for gradient in one)
        bound = (
            2 * gamma(ROUNDINGS + WIDTH * WIDTH) * largest
        )  # samples and a mask's elements are summed in another order
        assert all((a - b).abs().max() <= bound for a, b in zip(one, both, strict=True)) and largest > 1e-4
    assert first[1].keys() == alone[1].keys() and len(first[1]) == 5
    for name, value in first[1].items():
        assert torch.equal(value, second[1][name]), "the ranks drifted apart"
        assert (value - alone[1][name]).abs().max() <= 1e-6, name
        assert (value - (0.3 if name == "inner.w" else 0.0)).abs().max() > 1e-4, "something was learned"


def metrics_of(run: Path) -> dict[tuple[str, str], float]:
    """Of a step and a name, what metrics.csv says."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row["step"], key): float(value) for row in rows for key, value in row.items() if value and key != "step"}


@pytest.mark.slow
def test_the_command_line_in_two_processes(pool, image_folders, tmp_path):
    """One folder, one lock, one set of files, though each process runs the same command."""
    file = write_yaml(tmp_path / "tiny.yaml", pool_config(pool, image_folders))
    parallel = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    sgd = ["--model.search.optimizer=torch.optim.SGD", "--model.search.lr=0.5", "--data.batch_size=6"]
    sharded = [*parallel, "--model.copy=ShardedCopy"]
    shown = ["--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=1.0"]
    for name, words in (("one", ["--trainer.devices=1", *parallel[:1]]), ("two", parallel), ("sharded", sharded)):
        line = ["-m", "adamerge", "fit", *fit_words(file, "--name=n", *sgd, *shown, *words, steps=4), f"--id={name}"]
        done = child(line, tmp_path, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("run: ") == 1 and "sync_dist" not in done.stderr + done.stdout
    one, two, parts = (metrics_of(tmp_path / "runs/n" / name) for name in ("one", "two", "sharded"))
    assert one.keys() == two.keys() == parts.keys() and any("validation/accuracy" in key for _, key in one)
    for key, value in one.items():
        assert max(abs(two[key] - value), abs(parts[key] - value)) <= 1e-5 * max(1, abs(value)), key
    expected, plans, passes = coefficients(tmp_path / "runs/n/one"), {}, {}
    for name in ("one", "two", "sharded"):
        found = coefficients(tmp_path / "runs/n" / name)
        assert all((value - expected[key]).abs().max() <= 1e-6 for key, value in found.items())
        summary = json.loads((tmp_path / "runs/n" / name / "summary.json").read_text())
        plans[name], passes[name] = summary["plan"], summary["forward_passes"]["merged"]
    assert set(passes.values()) == {(4 + 3) * 2 * 6}, "those of all processes"
    assert sorted(path.name for path in (tmp_path / "runs/n").iterdir()) == ["one", "sharded", "two"]
    assert [plan["processes"] for plan in plans.values()] == [1, 2, 2] and plans["sharded"]["copy"] == "ShardedCopy"
    assert plans["two"]["gradient"] == plans["one"]["gradient"] > plans["sharded"]["gradient"]
    assert json.loads((tmp_path / "runs/n/two/environment.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_the_default_id_is_one_for_both_processes(pool, image_folders, tmp_path):
    file = write_yaml(tmp_path / "tiny.yaml", pool_config(pool, image_folders))
    parallel = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    done = child(["-m", "adamerge", "fit", *fit_words(file, "--name=n", *parallel)], tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "runs/n").iterdir())) == 1


@pytest.mark.slow
def test_a_fault_in_two_processes_ends_both(pool, image_folders, tmp_path):
    config = pool_config(pool, image_folders)
    config["model"]["task_vectors"]["experts"]["colours"] = str(tmp_path / "gone.safetensors")
    file = write_yaml(tmp_path / "tiny.yaml", config)
    parallel = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    line = [sys.executable, "-m", "adamerge", "fit", *fit_words(file, *parallel)]
    with subprocess.Popen(line, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        try:
            _, error = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            raise
    assert process.returncode == 3 and "gone.safetensors" in error and not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("copy", ["WholeCopy", "ShardedCopy"])
def test_a_killed_process_ends_the_run_and_leaves_a_checkpoint_that_goes_on(copy, pool, image_folders, tmp_path):
    file = write_yaml(tmp_path / "tiny.yaml", pool_config(pool, image_folders))
    parallel = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    words = fit_words(file, "--name=n", "--id=a", f"--model.copy={copy}", *parallel, steps=2000)
    run = tmp_path / "runs/n/a"
    line = [sys.executable, "-m", "adamerge", "fit", *words]
    with subprocess.Popen(line, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: any(run.glob("checkpoints/step=*.ckpt")) or process.poll() is not None, 120)
            assert process.poll() is None, process.stderr.read()[-3000:]
            (other,) = [n for n in running(file) if n != process.pid]
            os.kill(other, signal.SIGKILL)
            process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode != 0
    wait_for(lambda: not running(file), 30)
    assert json.loads((run / "summary.json").read_text())["status"] in {"failed", "running"}
    newest = max(run.glob("checkpoints/step=*.ckpt"), key=lambda path: path.stat().st_mtime)
    state = torch.load(newest, weights_only=False)
    assert state["global_step"] > 0 and all(torch.isfinite(value).all() for value in state["state_dict"].values())


def running(file: Path) -> list[int]:
    """Processes whose command line names a file."""
    found = []
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdecimal() and str(file) in (place / "cmdline").read_text():
                found.append(int(place.name))
        except OSError:
            continue  # it is gone
    return found


def wait_for(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_staged_method_with_teachers_in_two_processes(pool, image_folders, tmp_path):
    """Both processes go through both stages; they share the experts' passes, and end where one process ends."""
    file = write_yaml(tmp_path / "tiny.yaml", pool_config(pool, image_folders))
    method = Path(__file__).parents[1] / "configs" / "methods" / "expert_merging_plusplus"
    parallel = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    shared = ["--model.search.optimizer=torch.optim.SGD", "--model.search.schedule=null", "--model.search.lr=0.5"]
    words = ["fit", *fit_words(file, *shared, "--data.batch_size=6", "--name=staged", method=method, steps=4)]
    for name, more in (("alone", []), ("both", parallel)):
        done = child(["-m", "adamerge", *words, *more, f"--id={name}"], tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    runs = {name: tmp_path / "runs" / "staged" / name for name in ("alone", "both")}
    for stage in ("1_expert_merging", "2_chunks", "."):
        one, other = (coefficients(run / stage) for run in runs.values())
        assert one.keys() == other.keys() and all((one[name] - other[name]).abs().max() <= 1e-5 for name in one)
    found = json.loads((runs["both"] / "summary.json").read_text())
    assert found["status"] == "finished" and found["stages"]["1_expert_merging"]["teachers"]["forwards"] == {
        "colours": 3, "shapes": 3,
    }, "half of the six samples of a task"  # fmt: skip


TOY = """
import json, sys
from functools import partial
sys.path.insert(0, sys.argv[1])
import torch
from lightning import Trainer
from toy_points import QUIET, ToyClassifier, ToyPoints, vectors_of
from modules import descending
from adamerge.objectives import PseudoLabel, Unchanged
from adamerge.parametrizations import LayerWise
from adamerge import HighestScore, KeepBest

torch.set_num_threads(1)
objective = PseudoLabel(strong=Unchanged())
module = descending(ToyClassifier(), vectors_of(), partial(LayerWise, init=0.3), objective, 0.05)
trainer = Trainer(**QUIET, max_steps=12, max_epochs=1, devices=2, strategy="ddp", callbacks=[KeepBest(HighestScore(), 3)])
trainer.fit(module, ToyPoints(batch_size=9))
found = module.coefficients().protocol["selection"]
trusted = {task: module.objective.trusted(task).tolist() for task in ("one", "two")}
values = module.merged.parametrization.w.tolist()
with open(f"rank_{trainer.global_rank}.json", "w") as file:
    json.dump([found, trusted, values], file)
"""


@pytest.mark.slow
def test_two_processes_trust_the_same_samples_and_choose_the_same_step(tmp_path):
    (tmp_path / "fit.py").write_text(TOY)
    done = child([tmp_path / "fit.py", Path(__file__).parent], tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert any(label >= 0 for label in first[1]["one"]) and first[0]["looks"] == 5
