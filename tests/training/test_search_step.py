"""The operations of a search's step: numbers, moves that count and moves that do not, schedules, what is recorded."""

import torch
from lightning import Trainer
from modules import bilevel, descending
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from adamerge import Concrete, LayerWise, TaskVectors
from adamerge.backbones import OpenClipClassifier
from adamerge.objectives import Entropy
from adamerge.training.search_step import SearchStep

from .test_descent import QUIET, images


def made(make, pool, **arguments):
    vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"])
    part = LayerWise if make is descending else lambda vectors: Concrete(vectors, inner=LayerWise)
    return make(OpenClipClassifier(pool["base"]), vectors, part, Entropy(), hold=False, **arguments)


def watched(monkeypatch, module, folders, steps):
    """What the module knows of each step, and when the guard was asked."""
    seen, guarded = [], []
    record, before = SearchStep.record, module.guard.before_step

    def noted(step, evaluation, total):
        record(step, evaluation, total)
        seen.append((step.number, module.global_step, step.evaluation is evaluation, len(step.optimizers)))

    monkeypatch.setattr(SearchStep, "record", noted)
    module.guard.before_step = lambda optimizer: guarded.append(optimizer) or before(optimizer)
    trainer = Trainer(max_steps=steps, max_epochs=1, limit_val_batches=0, **QUIET)
    trainer.fit(module, images(folders, batch_size=6))
    return seen, guarded


def test_a_move_inside_is_not_counted_and_is_guarded_all_the_same(pool, image_folders, monkeypatch):
    module = made(bilevel, pool)
    seen, guarded = watched(monkeypatch, module, image_folders, 2)
    assert seen == [(0, 1, True, 2), (1, 2, True, 2)]
    inner, outer = module.optimizers(use_pl_optimizer=False)
    assert guarded == [inner, outer] * 2


def test_lightning_moves_what_is_automatic_after_the_step(pool, image_folders, monkeypatch):
    seen, guarded = watched(monkeypatch, made(descending, pool), image_folders, 2)
    assert seen == [(0, 0, True, 1), (1, 1, True, 1)] and len(guarded) == 2


def test_all_schedules_go_on_with_the_counted_move(pool, image_folders, monkeypatch):
    halved = lambda optimizer: StepLR(optimizer, 1, 0.5)  # noqa: E731
    rates = {"lr": 0.8, "inner_lr": 0.4, "schedule": halved, "inner_schedule": halved}
    module = made(bilevel, pool, optimizer=lambda p: SGD(p), inner_optimizer=lambda p: SGD(p), **rates)
    watched(monkeypatch, module, image_folders, 2)
    assert [one.param_groups[0]["lr"] for one in module.optimizers(use_pl_optimizer=False)] == [0.1, 0.2]
    assert all(not torch.is_tensor(p.grad) or not p.grad.any() for p in module.merged.trained()), "they begin anew"
