"""A collapse is found, named and ends a fit with the last healthy coefficients; what is no collapse is left alone."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CLASSES
from lightning import LightningModule
from running import command, fit_words, pool_config, without_pictures, write_yaml

from adamerge.backbones import OpenClipClassifier, Output
from adamerge.errors import CollapsedError
from adamerge.training import MergingModule
from adamerge.training.collapse_guard import CollapseGuard
from adamerge.training.objective_gradient import Evaluation


@pytest.fixture
def pool_file(pool, image_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    return write_yaml(tmp_path / "pools" / "tiny.yaml", pool_config(pool, image_folders))


class Given:
    """Stands for a Spread whose figures are given."""

    def __init__(self, share: float, spread: float, device: str = "cpu") -> None:
        self.top_class_share = lambda: torch.tensor(share, device=device)
        self.marginal_entropy = lambda: torch.tensor(spread, device=device)


class Module(MergingModule):
    """Stands for a module whose last evaluation is given."""

    def __init__(self, spread, data) -> None:
        LightningModule.__init__(self)
        self.evaluation, self.given = Evaluation({}, spread), data
        self.merging = SimpleNamespace(task_weights=None)
        self.merged = SimpleNamespace(parametrization=SimpleNamespace(state_dict=dict))
        self.held_out = SimpleNamespace(tasks=lambda data: [])
        self._trainer = SimpleNamespace(global_step=0)

    data = property(lambda self: self.given)


class Fit:
    """Stands for a trainer whose metrics are given."""

    global_step = 0
    world_size = 1
    datamodule = SimpleNamespace(batch_size=8)
    callbacks = ()
    strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)

    def step(self, guard: CollapseGuard, device: str = "cpu", **tasks: tuple[float, float]) -> None:
        self.global_step += 1
        spread = {task: Given(*given, device) for task, given in tasks.items()}
        guard.on_train_batch_end(self, Module(spread, self.datamodule), None, {}, self.global_step - 1)


GOOD, GONE = (0.3, 0.9), (1.0, 0.01)


def test_a_task_that_collapses_is_named():
    guard, fit = CollapseGuard(every=5), Fit()
    for _ in range(5):
        fit.step(guard, a=GOOD, b=GOOD)
    with pytest.raises(CollapsedError, match=r"step 10: .*task 'b'"):
        for _ in range(10):
            fit.step(guard, a=GOOD, b=GONE)


def test_one_sided_from_the_start_or_for_a_moment_is_no_collapse():
    guard, fit = CollapseGuard(every=5), Fit()
    for _ in range(30):
        fit.step(guard, one_class_data=GONE)
    for step in range(30):
        fit.step(guard, one_class_data=GONE, b=GONE if step % 5 == 2 else GOOD)


def test_the_guard_remembers_across_a_resume():
    """Healthy before the kill, collapsed after it: without its memory the guard would take it for one-sided data."""
    guard, fit = CollapseGuard(every=5), Fit()
    for _ in range(5):
        fit.step(guard, a=GOOD)
    resumed = CollapseGuard(every=5)
    resumed.load_state_dict(guard.state_dict())
    with pytest.raises(CollapsedError):
        for _ in range(10):
            fit.step(resumed, a=GONE)


def test_the_guard_goes_on_where_the_device_is_another():
    """A checkpoint is read to the CPU, whatever the fit runs on."""
    guard, fit = CollapseGuard(every=5), Fit()
    fit.step(guard, a=GOOD)
    resumed = CollapseGuard(every=5)
    resumed.load_state_dict(guard.state_dict())
    fit.step(resumed, device="meta", a=GOOD)
    assert resumed.state_dict()["sums"]["a"].device.type == "meta"


@pytest.mark.parametrize(("batch_size", "reduced"), [(3, 0), (4, 1)])
def test_what_counts_is_the_batch_of_all_processes(batch_size, reduced):
    """Each has two samples of four, and the spread is of all four; so all reduce or none does."""
    guard, fit, calls = CollapseGuard(every=1), Fit(), []
    fit.world_size, fit.datamodule = 2, SimpleNamespace(batch_size=batch_size)
    fit.strategy = SimpleNamespace(reduce=lambda tensor, reduce_op: calls.append(tensor) or tensor)
    fit.step(guard, a=GOOD)
    assert len(calls) == reduced


def test_a_fit_whose_predictions_collapse_ends(pool_file, monkeypatch, capfd):
    """One class for every sample of a task, from the 26th step on: the look after the 50th tells."""
    plain, calls = OpenClipClassifier.output, []

    def collapsing(self, encoded, task):
        calls.append(task)
        found = plain(self, encoded, task)
        samples, classes = found.logits.shape
        healthy = len(calls) <= 25 * len(CLASSES)
        wanted = torch.arange(samples) % classes if healthy else torch.zeros(samples, dtype=torch.int64)
        one_hot = torch.nn.functional.one_hot(wanted, classes) * (0.1 if healthy else 50.0)
        return Output(found.logits * 1e-3 + one_hot, encoded)

    monkeypatch.setattr(OpenClipClassifier, "output", collapsing)
    outcome = command(capfd, "fit", *fit_words(pool_file, "--name=n", "--id=a", steps=60))
    assert outcome.code == 4 and "step 50" in outcome.error and "collapsed" in outcome.error
    assert json.loads(Path("runs/n/a/summary.json").read_text())["status"] == "collapsed"


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_sure_predictions_of_many_classes_are_no_collapse(micro_batch, pool_file, monkeypatch, capfd):
    """With micro-batches too: the share of the most frequent class of ONE sample is always all of it."""
    plain, calls = OpenClipClassifier.output, []

    def surer(self, encoded, task):
        """Sample i of a forward pass is class i, unsure at first and sure later."""
        calls.append(task)
        found = plain(self, encoded, task)
        first = len(calls) // 2 if micro_batch else 0
        wanted = (torch.arange(len(encoded.features)) + first) % found.logits.shape[-1]
        sharpness = 0.1 if len(calls) < 50 else 50.0
        one_hot = torch.nn.functional.one_hot(wanted, found.logits.shape[-1]) * sharpness
        return Output(found.logits * 1e-3 + one_hot, encoded)

    monkeypatch.setattr(OpenClipClassifier, "output", surer)
    size = [f"--model.micro_batch={micro_batch}"] if micro_batch else []
    words = fit_words(pool_file, "--name=n", "--id=a", *size, steps=50)
    outcome = command(capfd, "fit", *words)
    assert outcome.code == 0, outcome.err[-1000:]
