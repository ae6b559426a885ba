"""A collapse is found, named and ends a fit with the last healthy coefficients; what is no collapse is left alone."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CLASSES
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import Trail, descending
from running import command, fit_words
from toy_points import INPUTS, QUIET, TASKS, ToyClassifier, ToyPoints, fit_toy, logits_of, vectors_of, weights_of

from adamerge.backbones import OpenClipClassifier, Output
from adamerge.errors import CollapsedError
from adamerge.objectives import CrossEntropy, Entropy, LogitAlignment, MarginalEntropy, Objective, Sum
from adamerge.parametrizations import LayerWise, TaskWise
from adamerge.training import MergingModule
from adamerge.training.collapse_guard import CollapseGuard
from adamerge.training.keep_best import KeepBest
from adamerge.training.objective_gradient import Evaluation
from adamerge.training.selection import HighestAgreement


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


class OneClass(Objective):
    """Plants a collapse: ``-log p`` of the first class, whatever the sample is."""

    def forward(self, output, batch):
        return -output.logits.log_softmax(-1)[:, 0]


def planted(lr=0.05, **arguments):
    return descending(ToyClassifier(), vectors_of(), partial(LayerWise, init=0.3), OneClass(), lr, **arguments)


def collapsed(module, data, callbacks, steps=100):
    """The error that ends a fit, and the step that it is told of."""
    with pytest.raises(CollapsedError) as raised:
        fit_toy(module, data, steps, callbacks=callbacks)
    return raised.value.what, int(raised.value.what.removeprefix("step ").partition(":")[0])


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_a_planted_collapse_is_flagged_and_the_last_healthy_step_is_the_result(share):
    """Within 100 steps, by what the steps see and, sooner or at the same look, by what they do not."""
    trail, module = Trail(), planted()
    what, step = collapsed(module, ToyPoints(rows=100, held_out=share), [trail, CollapseGuard(every=10)])
    assert step == max(trail.w) <= 100 and ("held-out" in what) is bool(share)
    healthy = step - 10
    assert torch.equal(module.merged.parametrization.w, trail.w[healthy])
    found = module.coefficients()
    chosen = found.protocol["selection"]
    assert found.step == chosen["step"] == healthy and chosen["collapsed"] == what and chosen["labelled"] is False


def test_what_is_held_out_tells_sooner():
    _, seen = collapsed(planted(), ToyPoints(rows=100), [CollapseGuard(every=10)])
    _, unseen = collapsed(planted(), ToyPoints(rows=100, held_out=0.1), [CollapseGuard(every=10)])
    assert unseen <= seen


def test_a_task_that_a_fit_moves_away_from_may_leave_its_expert():
    module = planted(task_weights={"one": -1e-6, "two": -1e-6})
    fit_toy(module, ToyPoints(rows=100, held_out=0.1), 30, callbacks=[CollapseGuard(every=10, share=1.1)])
    assert module.global_step == 30 and not module.result.choice


def test_where_a_step_was_chosen_the_fit_is_over_and_that_step_its_result():
    trail, module = Trail(), planted()
    callbacks = [trail, KeepBest(HighestAgreement(), every=5), CollapseGuard(every=10)]
    with pytest.warns(UserWarning, match="the fit is over, and the step that was chosen is its result"):
        fit_toy(module, ToyPoints(rows=100, held_out=0.1), 100, callbacks=callbacks)
    found = module.coefficients()
    assert (
        "collapsed" in module.result.ended
        and max(trail.w) < 100
        and found.protocol["selection"]["rule"] == "HighestAgreement"
    )
    assert torch.equal(module.merged.parametrization.w, trail.w[found.step]) and found.step < max(trail.w)


def test_a_resumed_fit_is_flagged_at_the_same_step_with_the_same_result(tmp_path):
    settings = {
        **QUIET,
        "enable_checkpointing": True,
        "max_epochs": 1,
        "max_steps": 100,
        "default_root_dir": str(tmp_path),
    }
    found = []
    for resume in (None, 7, 10):
        module, path = planted(lr=0.02), tmp_path / "kept" / f"step={resume}.ckpt"
        every = [
            ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=n, save_top_k=-1) for n in (7, 10)
        ]
        fit = Trainer(**settings, callbacks=[CollapseGuard(every=10), *every])
        with pytest.raises(CollapsedError) as raised:
            given = {} if resume is None else {"ckpt_path": path, "weights_only": True}
            fit.fit(module, ToyPoints(rows=100, held_out=0.1), **given)
        found.append((raised.value.what, module.coefficients().protocol, module.merged.parametrization.w.tolist()))
    assert found[0] == found[1] == found[2]


HEALTHY = {
    "entropy": (Entropy, 0.01),
    "alignment": (LogitAlignment, 0.03),
    "labels": (CrossEntropy, 0.03),
    "marginal entropy": (lambda: Sum([Entropy(), MarginalEntropy()], [1.0, 1.0]), 0.02),
}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", HEALTHY)
def test_healthy_fits_raise_no_alarm(kind, seed):
    """Twenty fits: four objectives with five orders of data and other inputs held out, 200 steps each, eight looks."""
    objective, lr = HEALTHY[kind]
    module = descending(ToyClassifier(), vectors_of(), partial(LayerWise, init=0.3), objective(), lr)
    data = ToyPoints(rows=100, held_out=0.1, seed=seed, labelled=module.objective.labelled)
    fit_toy(module, data, 200, callbacks=[CollapseGuard()])
    assert module.global_step == 200 and not module.result.choice


@pytest.mark.slow
def test_entropy_ten_times_too_long_is_worth_its_best_step():
    """At ten times the rate of a healthy fit, judged on 4,000 other points: the step chosen is within a point of the best."""
    base, experts = weights_of()
    generator = torch.Generator().manual_seed(99)
    points = {task: 1.5 * torch.randn(4000, INPUTS, generator=generator) for task in TASKS}

    def score(w):
        merged = {
            name: base[name] + sum(w[k, 0] * (experts[task][name] - base[name]) for k, task in enumerate(TASKS))
            for name in base
        }
        own = [logits_of(merged, task, points[task]).argmax(1) for task in TASKS]
        right = [logits_of(experts[task], task, points[task]).argmax(1) for task in TASKS]
        return float(
            torch.stack([(one == other).double().mean() for one, other in zip(own, right, strict=True)]).mean()
        )

    trail = Trail()
    module = descending(ToyClassifier(), vectors_of(), partial(TaskWise, init=0.3), Entropy(), 0.1)
    data = ToyPoints(rows=2000, held_out=0.5, batch_size=8)
    fit_toy(module, data, 400, callbacks=[trail, KeepBest(HighestAgreement(), every=10, patience=20), CollapseGuard()])
    scores = {step: score(w) for step, w in trail.w.items() if step % 10 == 0}
    chosen = score(module.merged.parametrization.w.detach())
    assert chosen >= max(scores.values()) - 0.01 and chosen > scores[0]
    assert module.result.ended and min(scores.values()) < chosen - 0.1, "the last ones before its end are far worse"
