"""What does not fit together is refused before anything is written."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer

from adamerge.errors import CheckpointError, ConfigError
from adamerge.merging.copies import WholeCopy
from adamerge.objectives import LogitAlignment, Objective
from adamerge.parametrizations import Concrete, LayerWise
from adamerge.task_vectors.memory import Available, Sizes
from adamerge.task_vectors.storage import Disk, Resident
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.fit_checks import _check_heads, check_same_models

from .test_adaptive import QUIET, fitted, images, module_of, w


class Supervised(Objective):
    """Cross-entropy, which needs labels."""

    labelled = True

    def forward(self, output, batch):
        return torch.nn.functional.cross_entropy(output.logits.float(), batch.labels, reduction="none")


def test_labelled_objectives_and_unlabelled_data_are_refused_and_the_other_way_round(pool, image_folders):
    with pytest.raises(ConfigError, match="Supervised needs labels"):
        fitted(module_of(pool, objective=Supervised()), images(image_folders))
    with pytest.raises(ConfigError, match="Entropy must not see labels"):
        fitted(module_of(pool), images(image_folders, labelled=True))
    module = module_of(pool, objective=Supervised())
    fitted(module, images(image_folders, labelled=True))
    assert not torch.equal(w(module), torch.full_like(w(module), 0.3))
    assert "labelled" in module.coefficients().protocol["calibration_split"]


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_precisions_that_round_coefficients_are_refused(precision, pool, image_folders):
    with pytest.raises(ConfigError, match=precision):
        fitted(module_of(pool), images(image_folders), precision=precision)


def test_an_expert_without_data_is_refused_and_data_without_an_expert_are_not(pool, image_folders):
    only = {"colours": image_folders["colours"]}
    with pytest.raises(ConfigError, match="shapes"):
        fitted(module_of(pool), images(only))
    one = {**pool, "experts": {"colours": pool["experts"]["colours"]}}
    fitted(module_of(one), images(image_folders))


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
    return SimpleNamespace(world_size=2, accumulate_grad_batches=1, _accelerator_connector=settings)


def test_a_sampler_of_the_trainers_is_refused_where_it_would_take_steps_away(pool, image_folders):
    """Lightning's default; with one process it is not used."""
    module = module_of(pool)
    module._trainer = two_processes(use_distributed_sampler=True)
    with pytest.raises(ConfigError, match=r"Trainer\(use_distributed_sampler=False\)"):
        module.check(images(image_folders), "32-true")
    module._trainer = Trainer(max_steps=1, **{**QUIET, "use_distributed_sampler": True})
    module.check(images(image_folders), "32-true")


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


class Collective(WholeCopy):
    """Whose processes go through each pass together."""

    collective = True


def test_processes_that_wait_for_each_other_make_the_same_passes(pool, image_folders):
    module = module_of(pool, copy=Collective(), micro_batch=3)
    module._trainer = two_processes(use_distributed_sampler=False)
    with pytest.raises(ConfigError, match="processes of a Collective would wait") as caught:
        module.check(images(image_folders, batch_size=7), "32-true")
    assert "a multiple of the 2 processes" in str(caught.value) and "data.batch_size=8" in str(caught.value)
    module.check(images(image_folders, batch_size=8), "32-true")
    module.micro_batch = None
    module.check(images(image_folders, batch_size=7), "32-true")


def test_teachers_and_processes_that_wait_for_each_other_are_refused(pool, image_folders):
    module = module_of(pool, copy=Collective(), objective=LogitAlignment())
    with pytest.raises(ConfigError, match=r"other passes of the experts.*"):
        module.check(images(image_folders), "32-true")


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
