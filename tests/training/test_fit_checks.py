"""What does not fit together is refused before anything is written."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer
from modules import bilevel

from adamerge.backbones import OpenClipClassifier
from adamerge.errors import CheckpointError, ConfigError
from adamerge.objectives import Entropy
from adamerge.parametrizations import Concrete, LayerWise
from adamerge.task_vectors.memory import Available, Sizes
from adamerge.task_vectors.storage import Disk, Resident
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.fit_checks import _check_heads, check_processes, check_same_models
from adamerge.training.method_checks import FitSettings

from .test_descent import QUIET, fitted, images, module_of
from .test_method_checks import Collective


def test_all_that_training_does_not_see_is_left_out_by_one_advice():
    """Not an ``include`` of a part that this network may not have."""
    base = {name: torch.zeros(2) for name in ("visual.w", "fc.w", "fc.b", "text.w", "text.b")}
    expert = {name: value + (name != "text.b") for name, value in base.items()}
    trained = SimpleNamespace(trains=lambda name: name.startswith("visual."))
    merged = SimpleNamespace(task_vectors=TaskVectors(base, {"cars": expert}), backbone=trained)
    with pytest.raises(ConfigError, match="expert 'cars' changed 'fc.b', on which") as found:
        _check_heads(merged)
    assert found.value.todo.startswith("pass exclude=['fc.*', 'text.w'] to leave")
    merged.task_vectors = TaskVectors(base, {"cars": expert}, exclude=["fc.*", "text.w"])
    _check_heads(merged)


def two_processes(use_distributed_sampler):
    settings = SimpleNamespace(use_distributed_sampler=use_distributed_sampler)
    return SimpleNamespace(world_size=2, accumulate_grad_batches=1, max_steps=1, _accelerator_connector=settings)


def asked(module, batch_size, trainer):
    check_processes(module.merged, module.search, module.merging.micro_batch, batch_size, trainer)


def test_a_sampler_of_the_trainers_is_refused_where_it_would_take_steps_away(pool, image_folders):
    """Lightning's default; with one process it is not used."""
    module = module_of(pool)
    with pytest.raises(ConfigError, match=r"Trainer\(use_distributed_sampler=False\)"):
        asked(module, 5, two_processes(use_distributed_sampler=True))
    asked(module, 5, Trainer(max_steps=1, **{**QUIET, "use_distributed_sampler": True}))


class Gathers:
    """Stands for the processes' group: the other one has read another expert."""

    def __init__(self, who):
        self.who = who

    is_initialized, get_world_size = staticmethod(lambda: True), staticmethod(lambda: 2)

    def all_gather_object(self, found, own):
        found[:] = [own, {**own, self.who: "f" * 64} if self.who else own]


@pytest.mark.parametrize("who", ["the base", "expert 'colours'", None])
def test_processes_that_read_other_models_are_told_which(who, pool, monkeypatch):
    vectors = module_of(pool).merged.task_vectors
    monkeypatch.setattr("adamerge.training.fit_checks.distributed", Gathers(who))
    if who is None:
        check_same_models(vectors)
        return
    with pytest.raises(
        CheckpointError, match=f"process 1 has another {who.removeprefix('the ')} than process 0"
    ) as caught:
        check_same_models(vectors)
    assert vectors.models()[who].fingerprint[:16] in str(caught.value) and "f" * 16 in str(caught.value)


def test_processes_that_wait_for_each_other_make_the_same_passes(pool, image_folders):
    module, trainer = module_of(pool, copy=Collective(), micro_batch=3), two_processes(use_distributed_sampler=False)
    with pytest.raises(ConfigError, match="processes of a Collective would wait") as caught:
        asked(module, 7, trainer)
    assert "a multiple of the 2 processes" in str(caught.value) and "data.batch_size=8" in str(caught.value)
    asked(module, 8, trainer)
    module.merging.micro_batch = None
    asked(module, 7, trainer)


def test_each_process_of_a_search_has_its_share_of_a_batch(pool):
    """A bilevel search halves what each of two processes sees of a task."""
    vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"])
    module = bilevel(OpenClipClassifier(pool["base"]), vectors, partial(Concrete, inner=LayerWise), Entropy())
    with pytest.raises(ConfigError, match="halves each task") as caught:
        asked(module, 3, two_processes(use_distributed_sampler=False))
    assert caught.value.expected == "at least 4" and caught.value.got == 3
    asked(module, 4, two_processes(use_distributed_sampler=False))


def counted(monkeypatch):
    """How often the whole list of checks is gone through."""
    calls, plain = [], Entropy.check
    monkeypatch.setattr(Entropy, "check", lambda self, task, *more: calls.append(task) or plain(self, task, *more))
    return calls


def test_everything_is_asked_once_before_a_fit_whoever_asks(pool, image_folders, monkeypatch):
    calls, module, data = counted(monkeypatch), module_of(pool), images(image_folders)
    module.preflight(data, FitSettings(steps=1, precision="32-true", clipped=False, validated=False))
    assert calls == ["colours", "shapes"]
    fitted(module, data, steps=1)
    assert calls == ["colours", "shapes"], "the fit that follows does not ask again"
    fitted(module, data, steps=2)
    assert calls == ["colours", "shapes"] * 2, "nobody had asked for this one"
    module.preflight(data, FitSettings(steps=1, precision="32-true", clipped=False, validated=False))
    fitted(module, images(image_folders), steps=3)
    assert calls == ["colours", "shapes"] * 4, "nor for these data"


def test_a_fit_takes_the_storage_that_its_plan_takes(pool, image_folders, monkeypatch):
    """Which knows what is learned: the logits of a mask, with Adam's moments, take more than what a storage needs."""
    stages = {}
    for kind in (LayerWise, partial(Concrete, inner=LayerWise)):
        module = module_of(pool, parametrization=kind)
        sizes = Sizes.of(module.merged.task_vectors)
        device = torch.device("cpu")
        # what the deltas and a gradient take, and half as much again of the copy for what is learned
        enough = Resident().needs(sizes, device).host + 6 * 4 * sizes.merged
        there = Available(round(enough / 0.8), 0)
        monkeypatch.setattr(Available, "on", classmethod(lambda cls, device, processes=None, there=there: there))
        fitted(module, images(image_folders), steps=1)
        stages[kind] = type(module.merged.storage)
    assert list(stages.values()) == [Resident, Disk]
