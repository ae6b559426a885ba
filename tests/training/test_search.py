"""A search without gradients keeps the contract: it is counted, resumes to the same bits, and needs no backward pass."""

from typing import Any

import pytest
import torch
from conftest import CLASSES
from lightning import Trainer
from rounding import gamma, roundings_of
from running import fit_words, pool_config, same_coefficients, without_pictures, write_yaml
from torch import Tensor
from torch.optim import Optimizer

from adamerge import Merging, MergingModule, Search, TaskVectors
from adamerge.backbones import OpenClipClassifier
from adamerge.objectives import Entropy
from adamerge.parametrizations import LayerWise
from adamerge.parametrizations.constraints import Projection
from adamerge.parametrizations.hashed_noise import logistic
from adamerge.runs.fit import fit
from adamerge.training import Descent
from adamerge.training.keep_best import KeepBest
from adamerge.training.run_checkpoints import StepCheckpoints
from adamerge.training.selection import HighestScore

from .test_descent import QUIET, fitted, images, w


class Placing(Optimizer):
    """Moves parameters to where it is told, and has no gradients."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {})
        self.targets: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure=None):
        closure()
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for parameter, target in zip(parameters, self.targets, strict=True):
            parameter.copy_(target)


class Perturbation(Search):
    """Tries random neighbours of the best coefficients, and goes to one that is better."""

    automatic = False
    penalised = False
    uses_gradients = False

    def __init__(self, scale: float = 0.05) -> None:
        self.scale = scale
        self.best, self.draws = float("inf"), 0

    def begin(self, merged) -> None:
        self.parameters = merged.trained()

    def optimizers(self, steps: int):
        return [(Placing(self.parameters), None)]

    def step(self, step, batch) -> None:
        before = [parameter.detach().clone() for parameter in self.parameters]
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters):
                noise = logistic((self.draws, number), parameter.numel(), parameter.device).view(parameter.shape)
                parameter += self.scale * noise
        tried = [parameter.detach().clone() for parameter in self.parameters]
        self.draws += 1
        step.merge(step.number, gradient=False)
        evaluation = step.evaluate(batch)
        better = float(evaluation.total) < self.best
        self.best = min(self.best, float(evaluation.total))
        for parameter, value in zip(self.parameters, before, strict=True):
            parameter.data.copy_(value)
        self.placing(step).targets = tried if better else before
        step.count()
        step.record(evaluation, evaluation.total)

    def placing(self, step) -> Any:
        return step.optimizers[-1]

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "draws": self.draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.draws = state["best"], state["draws"]


@pytest.fixture
def no_backward(monkeypatch):
    """Neither the objective nor the coefficients are differentiated."""

    def refuse(*arguments, **more):
        raise AssertionError("a gradient was asked for")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "grad", refuse)


def module_of(pool, search, constraint=None, objective=None) -> MergingModule:
    vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"])

    def parametrization(vectors):
        return LayerWise(vectors, 0.3, constraint or Projection())

    return MergingModule(
        Merging(
            backbone=OpenClipClassifier(pool["base"]),
            task_vectors=vectors,
            parametrization=parametrization,
            objective=objective or Entropy(),
            search=search,
        )
    )


def test_each_of_its_steps_is_one_that_lightning_counts(pool, image_folders, no_backward):
    module = fitted(module_of(pool, Perturbation()), images(image_folders), steps=6)
    assert module.global_step == module.search.draws == 6 and module.coefficients().step == 6
    assert not torch.equal(w(module), torch.full_like(w(module), 0.3)), "it went somewhere"
    assert module.search.best < float("inf") and set(module.evaluation.losses) == set(CLASSES)
    assert not module.merged.parametrization.held, "there is no gradient to tell by"


def test_the_constraint_holds_after_its_steps(pool, image_folders, no_backward):
    module = fitted(module_of(pool, Perturbation(scale=5.0)), images(image_folders), steps=2)
    assert w(module).min() == 0 and w(module).max() == 1


def test_it_never_ends_worse_than_the_first_that_it_tried(pool, image_folders, no_backward):
    """On the same batch at every step: all of a task's samples."""
    data = images(image_folders, batch_size=24)
    module = fitted(module_of(pool, Perturbation()), data, steps=1)
    first = module.search.best
    module = fitted(module_of(pool, Perturbation()), data, steps=8)
    assert module.search.best < first


def test_what_it_does_is_the_same_after_a_resume(pool, image_folders, tmp_path, no_backward):
    """State of the search, order of the data and the count of steps come back with a checkpoint of step 3."""
    whole = fitted(module_of(pool, Perturbation()), images(image_folders), steps=6)
    settings = {**QUIET, "enable_checkpointing": True, "limit_val_batches": 0, "max_epochs": 1}

    def trainer():
        saving = StepCheckpoints(
            tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1, save_on_train_epoch_end=False
        )
        return Trainer(max_steps=6, callbacks=[saving], **settings)

    trainer().fit(module_of(pool, Perturbation()), images(image_folders))
    again, resumed = module_of(pool, Perturbation()), trainer()
    resumed.fit(again, images(image_folders), ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["search"]
    assert saved["draws"] == 3 and saved["best"] >= again.search.best
    assert resumed.global_step == 6 and torch.equal(w(again), w(whole))
    assert (again.search.best, again.search.draws) == (whole.search.best, whole.search.draws)


def test_the_best_step_can_be_chosen_of_it(pool, image_folders, no_backward):
    module = module_of(pool, Perturbation(scale=1.0))
    trainer = Trainer(max_steps=4, max_epochs=1, callbacks=[KeepBest(HighestScore(), every=1)], **QUIET)
    trainer.fit(module, images(image_folders))
    assert module.result.choice["looks"] == 5 and module.coefficients().step == module.result.choice["step"]


def test_an_evaluation_is_that_of_the_backward_pass(pool, image_folders):
    """But for the rounding of other kernels: five positions and five samples of two tasks go through the network."""
    rounding = gamma(roundings_of(OpenClipClassifier(pool["base"]).network.visual, positions=5, samples=10))
    seen = {}

    class Both(Perturbation):
        def step(self, step, batch) -> None:
            step.merge(step.number, gradient=False)
            seen["value"] = step.evaluate(batch)
            assert all(place.gradient is None for place in merged._places.values())
            step.merge(step.number)
            seen["both"] = step.backward(batch)
            super().step(step, batch)

    module = module_of(pool, Both())
    merged = module.merged
    fitted(module, images(image_folders), steps=1)
    for task in CLASSES:
        value, both = seen["value"].losses[task], seen["both"].losses[task]
        assert both > 0.1 and (value - both).abs() <= 2 * rounding * both
        value, both = (seen[kind].spread[task].marginal_entropy() for kind in ("value", "both"))
        assert (value - both).abs() <= 2 * rounding


@pytest.mark.parametrize("times", [0, 2])
def test_a_search_that_does_not_count_its_step_once_is_told(times, pool, image_folders):
    class Astray(Perturbation):
        def step(self, step, batch) -> None:
            self.placing(step).targets = [parameter.detach().clone() for parameter in self.parameters]
            for _ in range(times):
                step.count()

    with pytest.raises(RuntimeError, match=f"Astray.step must call SearchStep.count once, and did so {times} times"):
        fitted(module_of(pool, Astray()), images(image_folders), steps=2)


def test_one_search_serves_several_modules(pool, image_folders):
    search = Descent(lr=0.05)
    one, other = module_of(pool, search), module_of(pool, search)
    fitted(one, images(image_folders), steps=2)
    assert (w(other) == 0.3).all() and (w(one) != 0.3).any()


@pytest.mark.slow
def test_a_run_of_ones_own_search_needs_no_edit_and_goes_on_to_more_steps(pool, image_folders, tmp_path, monkeypatch):
    """By its full name on the command line; a run of three steps that is resumed to six is one of six."""
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    file = write_yaml(tmp_path / "pools" / "tiny.yaml", pool_config(pool, image_folders))
    name = f"--model.search={Perturbation.__module__}.Perturbation"
    words = [name, "--model.search.scale=0.5", "--name=n"]
    whole = fit(fit_words(file, *words, "--id=whole", steps=6))
    short = fit(fit_words(file, *words, "--id=short", steps=3))
    assert not same_coefficients(whole, short)
    fit(["--trainer.max_steps=6"], short)
    assert same_coefficients(whole, short)
