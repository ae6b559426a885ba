"""Bilevel merging: three steps in float64, resets, counts, guards, and a killed run that resumes to the same bits."""

import copy
import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Trainer
from modules import bilevel, descending
from rounding import Disturb, allowed_each
from running import ROOT, command, environment, pool_config, same_coefficients, write_yaml
from torch.optim import SGD, Adam

from adamerge import Concrete, Frozen, LayerWise, TaskVectors, TaskWise
from adamerge.artifacts.coefficients import save_coefficients
from adamerge.backbones import OpenClipClassifier
from adamerge.data.batch_order import Steps
from adamerge.errors import ConfigError, DivergedError
from adamerge.objectives import Entropy
from adamerge.parametrizations.constraints import Free, Projection
from adamerge.parametrizations.hashed_noise import logistic
from adamerge.training.collapse_guard import CollapseGuard
from adamerge.training.search_step import SearchStep

from .test_descent import QUIET, fitted, images

STAGES = ROOT / "configs" / "methods" / "concrete_adamerging_layer_wise"


def sgd(parameters):
    return SGD(parameters, 1.0)


def module_of(pool, inner=LayerWise, search=bilevel, wrapped=Concrete, objective=None, **arguments):
    vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"])
    made, arguments = partial(wrapped, inner=inner), {"hold": False, **arguments}  # where merges are counted
    return search(OpenClipClassifier(pool["base"]), vectors, made, objective or Entropy(), **arguments)


def learned(module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.merged.parametrization.state_dict().items()}


def same(one, other) -> bool:
    return all(torch.equal(value, learned(other)[name]) for name, value in learned(one).items())


# the search in float64 --------------------------------------------------------------------------------------------


# a merge of two masked experts, the longest sum of a layer (of a patch) and a function of it; as many on the way back, and a
# sum over five positions of three samples
ROUNDINGS = 2 * (5 + 16 + 192 + 4) + 5 * 3


def by_hand(pool, folders, steps: int, fresh: bool, inner_lr: float, lr: float):
    """The paper's search in float64, with plain SGD: losses and gradients of every step, values of the last."""
    data = images(folders, batch_size=6)
    module = module_of(pool)
    backbone, vectors = module.merged.backbone, module.merged.task_vectors
    data.serve(backbone)
    backbone.build_heads(data.tasks, {})
    batches = Steps(
        {task: data.samples(task, "calibration") for task in data.tasks}, None, batch_size=6, seed=0, total=steps
    )
    network = copy.deepcopy(backbone.network).double().requires_grad_(False)
    noise = {
        (draw, name): logistic((0, draw, name), vectors.shape(name).numel(), torch.device("cpu")).double()
        for draw in range(2 * steps)
        for name in vectors
    }
    return partial(_trace, batches, backbone, network, vectors, noise, fresh, inner_lr, lr)


def _trace(batches, backbone, network, vectors, noise, fresh, inner_lr, lr, disturb: Disturb) -> dict:
    base = {name: disturb(value.double()) for name, value in vectors.base.items()}
    tau = {name: disturb(vectors[name].dense().double()) for name in vectors}
    x = {name: torch.zeros(vectors.shape(name), dtype=torch.float64) for name in vectors}
    start, trace = torch.full((2, len(vectors)), 0.3, dtype=torch.float64), {}

    def loss_of(w, logits, draw, part):
        merged = {}
        for column, name in enumerate(vectors):
            m = 1 / (1 + torch.exp(-(noise[draw, name].view(x[name].shape) + logits[name]) / 0.5))
            masked = [w[k, column] * tau[name][k] * m / m.mean() for k in range(2)]
            merged[name] = base[name] + sum(masked)
        state = {f"visual.{n}": v for n, v in network.visual.state_dict().items()}
        visual = {n.removeprefix("visual."): v for n, v in {**state, **merged}.items()}
        total = 0.0
        for task, batch in part.items():
            pixels = (batch.double() / 255 - backbone._mean.double()) / backbone._std.double()
            features = torch.func.functional_call(network.visual, visual, (pixels,))
            p = (torch.nn.functional.normalize(features, dim=-1) @ backbone.heads[task].weight.double().T).softmax(-1)
            total = total - (p * p.log()).sum(-1).mean()
        return total

    for step in range(len(batches)):
        inputs = {task: batch.inputs for task, batch in batches[step].items()}
        w = start.clone().requires_grad_(True)
        inner = loss_of(w, x, 2 * step, {task: pixels[:3] for task, pixels in inputs.items()})
        of_w = torch.autograd.grad(inner, w)[0]
        adapted = start - inner_lr * of_w
        logits = {name: value.clone().requires_grad_(True) for name, value in x.items()}
        outer = loss_of(adapted, logits, 2 * step + fresh, {task: pixels[3:] for task, pixels in inputs.items()})
        of_x = dict(zip(logits, torch.autograd.grad(outer, list(logits.values())), strict=True))
        x = {name: x[name] - lr * of_x[name] for name in x}
        trace |= {f"loss of step {step}": outer.detach(), f"dw of step {step}": of_w}
        trace |= {f"dx of step {step}, {name}": value for name, value in of_x.items()}
    return {**trace, "w": adapted, **x}


@pytest.mark.parametrize("fresh", [True, False])
def test_three_steps_are_those_of_the_paper_in_float64(fresh, pool, image_folders, monkeypatch):
    inner_lr, lr = 0.3, 20.0
    module, gradients, losses = (
        module_of(pool, lr=lr, inner_lr=inner_lr, optimizer=sgd, inner_optimizer=sgd, fresh_noise=fresh),
        [],
        [],
    )
    before_step = module.guard.before_step

    def watched(optimizer):
        gradients.append([p.grad.clone() for group in optimizer.param_groups for p in group["params"]])
        before_step(optimizer)

    module.guard.before_step = watched
    record = SearchStep.record

    def noted(step, evaluation, total):
        losses.append(float(total))
        record(step, evaluation, total)

    monkeypatch.setattr(SearchStep, "record", noted)
    fitted(module, images(image_folders, batch_size=6), steps=3)
    expected = allowed_each(by_hand(pool, image_folders, 3, fresh, inner_lr, lr), ROUNDINGS, draws=4)
    made = module.merged.parametrization
    found = {"w": made.inner.w.detach(), **{name: logits.detach() for name, logits in made.masks().items()}}
    for step, loss in enumerate(losses):
        found |= {f"loss of step {step}": torch.tensor(loss), f"dw of step {step}": gradients[2 * step][0]}
        found |= {f"dx of step {step}, {n}": g for n, g in zip(made.masks(), gradients[2 * step + 1], strict=True)}
    assert found.keys() == expected.keys()
    for name, (right, slack) in expected.items():
        assert (found[name].double() - right).abs().max() <= slack, name
        assert slack <= 1e-4 * max(1.0, float(right.abs().max())), name
    assert max(float(expected[name][0].abs().max()) for name in made.masks()) > 0.1, "the mask moved"


# the search under a trainer ---------------------------------------------------------------------------------------


def test_steps_are_the_searchs_own_and_each_begins_where_the_fit_did(pool, image_folders):
    module, seen, draws = module_of(pool), [], []
    merge = module.merged.merge

    def watched(draw=None, *wanted):
        draws.append(draw)
        seen.append(module.merged.parametrization.inner.w.detach().clone())
        merge(draw, *wanted)

    module.merged.merge = watched
    fitted(module, images(image_folders, batch_size=6), steps=3)
    assert module.global_step == 3 and draws == [0, 1, 2, 3, 4, 5]
    assert all((w == 0.3).all() for w in seen[::2]), "reset BEFORE the inner merge"
    assert all((w != 0.3).any() for w in seen[1::2])
    # the first step of Adam is its rate: the sign decides
    assert ((seen[1] - 0.3).abs() - 1).abs().min() < 1e-3
    assert module.coefficients().step == 3


def test_the_constraint_holds_after_the_inner_step(pool, image_folders):
    module = fitted(module_of(pool, partial(LayerWise, constraint=Projection())), images(image_folders, batch_size=6))
    w = module.merged.parametrization.inner.w.detach()
    assert w.min() == 0 and w.max() == 1


def test_a_fit_starts_where_its_file_says(pool, image_folders, tmp_path):
    first = fitted(module_of(pool, TaskWise, inner_lr=0.01), images(image_folders, batch_size=6))
    save_coefficients(first.coefficients(), tmp_path / "c.safetensors")
    again = module_of(pool, TaskWise, init_from=tmp_path / "c.safetensors")
    assert same(first, again) and torch.equal(again.search._start[0], first.merged.parametrization.inner.w)


@pytest.mark.slow
def test_validation_in_between_sees_the_declared_mask_and_disturbs_nothing(pool, image_folders):
    quiet = fitted(module_of(pool), images(image_folders, batch_size=6), steps=3)
    module, draws = module_of(pool), []
    merge = module.merged.merge
    module.merged.merge = lambda draw=None, *wanted: draws.append(draw) or merge(draw, *wanted)
    trainer = Trainer(max_steps=3, max_epochs=1, val_check_interval=1, callbacks=[CollapseGuard(every=1)], **QUIET)
    trainer.fit(module, images(image_folders, batch_size=6))
    assert same(quiet, module)
    assert draws == [0, 1, None, 2, 3, None, 4, 5, None]


def test_micro_batches_change_nothing(pool, image_folders):
    options = {"optimizer": sgd, "inner_optimizer": sgd, "inner_lr": 0.1, "lr": 1.0}
    whole = fitted(module_of(pool, **options), images(image_folders, batch_size=8), steps=2)
    parts = fitted(module_of(pool, micro_batch=3, **options), images(image_folders, batch_size=8), steps=2)
    assert all((value - learned(parts)[name]).abs().max() < 1e-5 for name, value in learned(whole).items())


class PoisonedAt(Entropy):
    """Not finite at one of its evaluations of a task."""

    def __init__(self, evaluation: int) -> None:
        super().__init__()
        self.evaluation, self.calls = evaluation, 0

    def forward(self, output, batch):
        self.calls += 1
        return super().forward(output, batch) * (float("nan") if self.calls == self.evaluation else 1.0)


@pytest.mark.parametrize("evaluation", [9, 11], ids=["inner", "outer"])  # two tasks, two halves: the third step
def test_the_guard_undoes_what_is_not_finite_in_either_half(evaluation, pool, image_folders):
    good = fitted(module_of(pool), images(image_folders, batch_size=6), steps=2)
    bad = module_of(pool, objective=PoisonedAt(evaluation))
    with pytest.raises(DivergedError, match="step 3"):
        fitted(bad, images(image_folders, batch_size=6), steps=6)
    logits = {name: value for name, value in learned(good).items() if name.startswith("logits")}
    assert all(torch.equal(value, learned(bad)[name]) for name, value in logits.items())


def test_who_has_no_two_groups_is_told(pool, image_folders):
    vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"])
    backbone = OpenClipClassifier(pool["base"])
    with pytest.raises(ConfigError, match="LayerWise has no mask"):
        bilevel(backbone, vectors, LayerWise, Entropy())
    with pytest.raises(ConfigError, match="Concrete has no coefficients"):
        bilevel(backbone, vectors, partial(Concrete, inner=partial(Frozen, inner=TaskWise)), Entropy())
    with pytest.raises(ConfigError, match="inner_lr"):
        module_of(pool, inner_lr=0.0)
    with pytest.raises(ConfigError, match="halves each task"):
        fitted(module_of(pool), images(image_folders, batch_size=1))


def test_concrete_task_arithmetic_is_adaptive_merging_of_the_mask_alone(pool, image_folders):
    frozen = partial(Frozen, inner=partial(TaskWise, init=0.3, constraint=Free()))
    module = module_of(pool, frozen, descending, optimizer=Adam, lr=0.01)
    draws, merge = [], module.merged.merge
    module.merged.merge = lambda draw=None, *wanted: draws.append(draw) or merge(draw, *wanted)
    fitted(module, images(image_folders), steps=3)
    state = learned(module)
    assert draws == [0, 1, 2] and (state["inner.inner.w"] == torch.tensor(0.3)).all()
    assert max(float(value.abs().max()) for name, value in state.items() if "logits" in name) > 0.01


# runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool_file(pool, image_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_yaml(tmp_path / "pools" / "tiny.yaml", pool_config(pool, image_folders))


def words(pool_file, steps: int, *more: object) -> list[object]:
    quick = ["--trainer.enable_progress_bar=false", "--data.batch_size=6", f"--1.trainer.max_steps={steps}"]
    return ["fit", "--config", pool_file, "--config", STAGES, *quick, "--2.trainer.max_steps=2", "--name=n", *more]


@pytest.mark.slow
def test_both_stages_by_one_command_are_scored_exported_and_shown(pool_file, capfd):
    outcome = command(capfd, *words(pool_file, 3, "--id=a"))
    assert outcome.code == 0, outcome.err[-3000:]
    run = Path("runs/n/a")
    assert json.loads((run / "1_mask" / "summary.json").read_text())["step"] == 3
    logged = json.loads((run / "2_coefficients" / "summary.json").read_text())["metrics"]
    outcome = command(capfd, "test", run / "2_coefficients", "--split", "validation")
    scored = json.loads((run / "2_coefficients" / "summary.json").read_text())["validation"]
    assert outcome.code == 0 and scored["average"] == pytest.approx(logged["validation/accuracy"], abs=1e-6)
    (run / "1_mask" / "coefficients.safetensors").unlink()  # the second file needs no first
    assert command(capfd, "export", run / "coefficients.safetensors", "merged").code == 0
    shown = command(capfd, "inspect", run / "coefficients.safetensors")
    assert shown.code == 0 and "learned mask" in shown.out and "share above 0.5" in shown.out
    assert (
        yaml.safe_load((run / "1_mask" / "config.yaml").read_text())["model"]["search"]["class_path"]
        == "adamerge.Bilevel"
    )


@pytest.mark.slow
def test_a_killed_search_resumes_to_the_same_bits(pool_file, capfd):
    steps = 60
    assert command(capfd, *words(pool_file, steps, "--id=whole")).code == 0
    line = [sys.executable, "-m", "adamerge", *map(str, words(pool_file, steps, "--id=killed"))]
    run = Path("runs/n/killed/1_mask")
    with subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for _ in range(3000):
            if list(run.glob("checkpoints/step=[1-4]?.ckpt")) or process.poll() is not None:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (run / "coefficients.safetensors").exists(), "it was killed in time"
    assert command(capfd, "fit", "--resume", "runs/n/killed").code == 0
    assert same_coefficients(run, Path("runs/n/whole/1_mask"))
    assert same_coefficients(Path("runs/n/killed"), Path("runs/n/whole"))
