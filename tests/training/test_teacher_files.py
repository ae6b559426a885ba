"""Teacher files: found again by whom they are right for, whole or not there, and shared by processes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from rounding import allowed
from running import environment
from taught import Counting, module_of, other_expert, w
from toys import QUIET, WIDTH, ToyLanguage, ToyTexts, forward, toy_fit, toy_weights

from adamerge.data.batch_order import Steps
from adamerge.errors import ConfigError
from adamerge.objectives import HiddenAlignment
from adamerge.training import TeacherCache, TeacherFiles


def test_files_are_found_again_by_another_fit(tmp_path):
    for expected in ({"one": 10, "two": 10}, {"one": 0, "two": 0}):
        module = module_of(TeacherFiles(folder=tmp_path))
        toy_fit(module, ToyTexts())
        report = module.teachers.report()
        assert report["forwards"] == expected and {k: 10 - v for k, v in expected.items()} == report["found"]
    assert module.merged.backbone.taught == []


def other_top(tmp_path):
    return module_of(TeacherFiles(top=3, folder=tmp_path)), ToyTexts()


def other_layers(tmp_path):
    return module_of(TeacherFiles(folder=tmp_path), HiddenAlignment([1])), ToyTexts()


def other_data(tmp_path):
    class Shifted(ToyTexts):
        def load(self, task):
            splits = super().load(task)
            if task == "two":
                return splits
            return {
                name: rows.map(lambda row: {"tokens": [t // 2 for t in row["tokens"]]}) for name, rows in splits.items()
            }

    return module_of(TeacherFiles(folder=tmp_path)), Shifted()


@pytest.mark.parametrize("change", [other_top, other_layers, other_expert, other_data])
def test_files_of_something_else_are_not_used(change, tmp_path):
    toy_fit(module_of(TeacherFiles(folder=tmp_path)), ToyTexts())
    module, data = change(tmp_path)
    toy_fit(module, data)
    forwards = module.teachers.report()["forwards"]
    assert forwards["one"] == 10 and forwards["two"] == (0 if change in (other_expert, other_data) else 10)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "gone"])
def test_damaged_files_are_made_again(damage, tmp_path):
    right = w(toy_fit(module_of(TeacherFiles(folder=tmp_path)), ToyTexts()))
    path = sorted(tmp_path.rglob("*.safetensors"))[0]
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:-9], "garbage": b"\7" * 99, "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    module = module_of(TeacherFiles(folder=tmp_path))
    assert torch.equal(w(toy_fit(module, ToyTexts())), right)
    assert 0 < sum(module.teachers.report()["forwards"].values()) <= 4


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from functools import partial
from torch.optim import SGD
from toys import ToyLanguage, ToyTexts, toy_fit, toy_vectors
from modules import descending
from adamerge import LayerWise, LogitAlignment, TeacherFiles

plain = ToyLanguage.encode

def dying(self, inputs, hidden=()):
    if self.samples_seen >= 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, inputs, hidden)

ToyLanguage.encode = dying
vectors = toy_vectors()
teachers = TeacherFiles(folder=sys.argv[2])
module = descending(ToyLanguage(), vectors, partial(LayerWise, init=0.3), LogitAlignment(), teachers=teachers)
toy_fit(module, ToyTexts(), 9)
"""


@pytest.mark.slow
def test_a_killed_job_runs_none_of_them_twice(tmp_path):
    """Killed after four forward passes: 4, 4 and 2 of the first task and 4 of the second, all complete."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    folder = tmp_path / "teachers"
    line = [sys.executable, str(script), str(Path(__file__).parents[1]), str(folder)]
    ended = subprocess.run(line, env=environment(), capture_output=True, timeout=100, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    module = module_of(TeacherFiles(folder=folder), backbone=ToyLanguage())
    toy_fit(module, ToyTexts(), 9)
    assert module.teachers.report()["found"] == {"one": 10, "two": 4}
    assert module.teachers.report()["forwards"] == {"one": 0, "two": 6}
    assert torch.equal(w(module), w(toy_fit(module_of(), ToyTexts(), 9)))


def test_the_identity_can_be_read_by_a_person(tmp_path):
    toy_fit(module_of(TeacherFiles(folder=tmp_path)), ToyTexts())
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*/identity.json")]
    assert {entry["task"] for entry in found} == {"one", "two"} and all(len(entry["expert"]) == 64 for entry in found)
    assert not [path for path in tmp_path.rglob("*") if ".adamerge-" in path.name]


def test_two_processes_share_the_samples_without_overlap():
    samples = ToyTexts()
    samples.serve(ToyLanguage())

    def steps(rank):
        return Steps(
            {"one": samples.samples("one", "calibration")}, None, batch_size=4, seed=0, total=9, rank=rank, world_size=2
        )

    shares = [TeacherFiles()._wanted("one", steps(rank)) for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == list(range(10)) and abs(len(shares[0]) - len(shares[1])) <= 1
    own = [set(TeacherCache()._wanted("one", steps(rank))) for rank in (0, 1)]
    for rank in (0, 1):
        used = {int(i) for step in range(9) for i in steps(rank)[step]["one"].indices}
        assert own[rank] == used


class Backwards(ToyTexts):
    """The same samples, which have other numbers."""

    def load(self, task):
        return {split: rows.select(range(len(rows))[::-1]) for split, rows in super().load(task).items()}


def as_they_are(task, batch):
    """No views."""
    return batch


class OfTwo:
    """Stands for the strategy of one of two processes."""

    precision_plugin = Trainer(**QUIET).strategy.precision_plugin

    def barrier(self, name):
        """Both are there."""


def test_a_sample_of_an_earlier_fit_under_the_same_number_is_not_taken_for_this_ones(tmp_path):
    """Two processes read all files of the folder, and a file of either fit may come last; batches differ."""
    module, expert = module_of(), {name: value.double() for name, value in toy_weights(("one",))[1]["one"].items()}
    module.merged.fill(module.merged.task_vectors.base.__getitem__)
    for kind in (ToyTexts, Backwards, ToyTexts, Backwards):
        data = kind()
        data.serve(module.merged.backbone)
        module.merged.backbone.build_heads(data.tasks, module.merged.task_vectors.checkpoints)
        steps = Steps({"one": data.samples("one", "calibration")}, None, batch_size=4, seed=0, total=9, world_size=2)
        for rank in (1, 0):
            steps.rank = rank
            cache = TeacherFiles(folder=tmp_path)
            cache.begin(
                module.merged, steps, (), show=as_they_are, batch_size=4, strategy=OfTwo(), default_folder=tmp_path
            )
        wanted = TeacherCache()._wanted("one", steps)
        assert len(wanted) > 5
        for index in wanted:
            sample = steps.samples["one"][index]
            right, slack = allowed(
                lambda disturb, tokens=sample["tokens"]: forward({n: disturb(v) for n, v in expert.items()}, tokens)[1],
                WIDTH + 4,
            )
            counted, found = sample["counts"], cache("one", index).logits.double()
            assert slack < 1e-4 and (found[counted[: len(found)]] - right[counted]).abs().max() <= slack


def test_a_network_that_hides_its_arguments_cannot_be_found_again(tmp_path):
    class Secretive(Counting):
        def __init__(self, size=3):
            super().__init__()

    with pytest.raises(ConfigError, match="Secretive"):
        toy_fit(module_of(TeacherFiles(folder=tmp_path), backbone=Secretive()), ToyTexts())
    toy_fit(module_of(backbone=Secretive()), ToyTexts())
