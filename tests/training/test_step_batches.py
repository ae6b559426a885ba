"""Step batches: every pass of a step, the one that decides what is held included, sees the same views and teachers."""

from __future__ import annotations

import pytest
import torch
from toy_points import ToyClassifier, ToyPoints, fit_toy

from adamerge.errors import ConfigError
from adamerge.objectives import LogitAlignment, MixInputs, TokenDropout

from .test_teachers_ahead import Noise, Watching, module_of


def test_the_first_gradient_is_of_the_first_steps_view():
    """Three passes decide what is held, then the first step: all on one view, with one teacher."""
    watching = Watching(LogitAlignment())
    fit_toy(module_of(objective=watching, hold=True), ToyPoints(), 2)
    seen = [batch for task, batch in watching.seen if task == "one"]
    assert [batch.step for batch in seen] == [0, 0, 0, 0, 1]
    for batch in seen[:4]:
        assert torch.equal(batch.inputs, seen[0].inputs) and torch.equal(batch.teacher.logits, seen[0].teacher.logits)
    assert not torch.equal(seen[4].teacher.logits, seen[0].teacher.logits)


def test_samples_of_two_tasks_have_views_of_their_own():
    module, data = module_of(), ToyPoints()
    fit_toy(module, data, 1)
    one, other = (module.batches.view(task, data.steps()[0]["one"]).inputs for task in ("one", "two"))
    assert not torch.equal(one, other)
    assert torch.equal(one, module.batches.view("one", data.steps()[0]["one"]).inputs)


def test_another_seed_of_the_data_is_another_view():
    views = []
    for seed in (0, 1):
        module = fit_toy(module_of(), ToyPoints(seed=seed), 1)
        views.append(module.batches.view("one", ToyPointsOf().part).inputs)
    assert not torch.equal(*views)


class ToyPointsOf:
    """Four points of one task, whatever the seed of the data is."""

    def __init__(self):
        data = ToyPoints()
        data.serve(ToyClassifier())
        samples = data.samples("one", "calibration")
        from adamerge.backbones import Batch

        self.part = Batch(torch.stack([samples[i] for i in range(4)]), indices=torch.arange(4), step=3)


@pytest.mark.parametrize("view", [MixInputs(), TokenDropout()])
def test_a_view_that_the_samples_do_not_go_with_is_refused_before_the_fit(view):
    with pytest.raises(ConfigError, match="model.views, task 'one': .* is for"):
        fit_toy(module_of(views=view), ToyPoints(), 1)


def test_nothing_of_a_step_is_changed_without_views():
    module, data = module_of(views=None), ToyPoints()
    fit_toy(module, data, 1)
    batch = data.steps()[0]
    assert all(part is batch[task] for task, part in module.batches(batch).items())
    assert isinstance(Noise().of(module.merged.backbone), Noise)
