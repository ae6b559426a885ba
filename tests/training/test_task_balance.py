"""Task balance: all tasks begin with losses of one size, decided once for a run and kept by its checkpoints."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import descending
from toy_points import QUIET, TASKS, ToyClassifier, ToyPoints, fit_toy, vectors_of

from adamerge import EqualAtStart, LayerWise
from adamerge.errors import ConfigError
from adamerge.objectives import LogitAlignment


def module_of(lr=0.1, **arguments):
    return descending(ToyClassifier(), vectors_of(), partial(LayerWise, init=0.3), LogitAlignment(), lr, **arguments)


def losses(module):
    return {task: float(loss) for task, loss in module.evaluation.losses.items()}


def test_weights_by_hand():
    """Sizes 1, 2 and 6 of mean 3; a share of 1/2 has none count as less than 1.5."""
    sizes = torch.tensor([1.0, -2.0, 6.0])
    assert EqualAtStart().weights(sizes).tolist() == [3.0, 1.5, 0.5]
    assert EqualAtStart(0.5).weights(sizes).tolist() == [2.0, 1.5, 0.5]
    assert EqualAtStart().weights(torch.tensor([0.0, 2.0])).tolist() == pytest.approx([20.0, 0.5])
    assert torch.isfinite(EqualAtStart().weights(torch.zeros(2))).all()


@pytest.mark.parametrize("hold", [True, False])
def test_all_tasks_begin_with_losses_of_one_size_and_the_sum_that_it_was(hold):
    plain, equal = module_of(1e-9, hold=hold), module_of(1e-9, hold=hold, balance=EqualAtStart())
    fit_toy(plain, ToyPoints(), 1)
    fit_toy(equal, ToyPoints(), 1)
    before, after = losses(plain), losses(equal)
    assert max(before.values()) > 1.2 * min(before.values())
    assert list(after.values()) == pytest.approx([sum(before.values()) / 2] * 2, rel=1e-5)


def test_given_weights_count_beside_them():
    module = module_of(1e-9, balance=EqualAtStart(), task_weights={"two": -0.5})
    fit_toy(module, ToyPoints(), 1)
    after = losses(module)
    assert after["two"] == pytest.approx(-0.5 * after["one"], rel=1e-5)


def test_they_are_decided_once_for_a_run(tmp_path):
    settings = {**QUIET, "enable_checkpointing": True, "max_steps": 8, "max_epochs": 1}
    settings["default_root_dir"] = str(tmp_path)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    whole, resumed = module_of(balance=EqualAtStart()), module_of(balance=EqualAtStart())
    Trainer(**settings, callbacks=[keep]).fit(whole, ToyPoints())
    saved = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["balance"]
    assert saved.keys() == set(TASKS) and all(saved[task] == whole.balance.of()[task] for task in TASKS)
    Trainer(**settings).fit(resumed, ToyPoints(), ckpt_path=tmp_path / "step=5.ckpt", weights_only=True)
    assert torch.equal(resumed.merged.parametrization.w, whole.merged.parametrization.w)
    assert resumed.balance.of() == whole.balance.of()
    again = fit_toy(module_of(), ToyPoints(), 8)
    assert not torch.equal(again.merged.parametrization.w, whole.merged.parametrization.w)
    assert again.balance.of() == {}


@pytest.mark.parametrize("least", [0.0, 1.5, -1.0])
def test_numbers_out_of_range_are_refused(least):
    with pytest.raises(ConfigError, match="EqualAtStart"):
        EqualAtStart(least)
