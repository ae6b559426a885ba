"""Teachers that run ahead: each expert sees the view that the merged model sees, and how far ahead changes no bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from modules import bilevel, descending
from rounding import allowed
from running import child
from toy_points import QUIET, ROUNDINGS, TASKS, ToyClassifier, ToyPoints, fit_toy, logits_of, vectors_of, weights_of
from toys import ToyLanguage, ToyTexts, toy_fit, toy_vectors

from adamerge import BlockCopy, Concrete, LayerWise, TeacherCache, TeacherFiles, TeachersAhead, WholeCopy
from adamerge.data.batch_order import seed_of
from adamerge.errors import ConfigError
from adamerge.objectives import CrossEntropy, Entropy, HiddenAlignment, LogitAlignment, Sum, View
from adamerge.objectives.views import seeds_of, uniform
from adamerge.task_vectors.task_vectors import TaskVectors


class Noise(View):
    """Points moved at random, each by its own seed."""

    def __call__(self, inputs, seeds):
        return inputs + moves_of(seeds, inputs.shape[1]).to(inputs.device)


class OtherTokens(View):
    """Tokens of which some are others."""

    def __call__(self, inputs, seeds):
        numbers = uniform(seeds[:, None], torch.arange(inputs["tokens"].shape[1]))
        return inputs | {"tokens": torch.where(numbers < 0.4, (7 * inputs["tokens"] + 1) % 11, inputs["tokens"])}


class Watching(Sum):
    """Remembers the batches that it is given."""

    def __init__(self, *parts):
        super().__init__(parts)
        self.seen = []

    def prepare(self, task, batch, predict):
        self.seen.append((task, batch))
        return super().prepare(task, batch, predict)


def moves_of(seeds, width):
    return torch.stack([uniform(seeds, number) for number in range(width)], dim=1) - 0.5


def module_of(teachers=None, objective=None, **arguments):
    arguments = {"hold": False, "views": Noise(), "lr": 0.1, **arguments}
    return descending(
        ToyClassifier(), vectors_of(), partial(LayerWise, init=0.3), objective or LogitAlignment(), teachers=teachers,
        **arguments,
    )  # fmt: skip


def w(module):
    return module.merged.parametrization.w.detach()


def test_each_expert_is_asked_on_the_view_that_the_merged_model_sees():
    """Twelve steps of 8 of 40 samples: each sample comes several times, and looks otherwise each time."""
    watching, data = Watching(LogitAlignment()), ToyPoints(seed=5)
    fit_toy(module_of(objective=watching), data, 12)
    assert len(watching.seen) == 2 * 12
    _, experts = weights_of()
    for task, batch in watching.seen:
        points = torch.stack([data.samples(task, "calibration")[int(index)] for index in batch.indices])
        moves = moves_of(seeds_of(seed_of(5, task, "views"), batch.step, batch.indices), points.shape[1])
        assert torch.equal(batch.inputs, points + moves) and moves.abs().max() > 0.3
        expert = {name: value.double() for name, value in experts[task].items()}
        right, slack = allowed(
            lambda disturb, expert=expert, task=task, seen=batch.inputs: logits_of(
                {name: disturb(value) for name, value in expert.items()}, task, seen.double()
            ),
            ROUNDINGS,
        )
        assert (batch.teacher.logits.double() - right).abs().max() <= slack < 1e-4
        assert not batch.teacher.logits.requires_grad


@pytest.mark.parametrize("arguments", [{"micro_batch": 3, "hold": True}, pytest.param({}, marks=pytest.mark.slow)])
def test_how_far_ahead_changes_no_bit(arguments):
    found = []
    for every, fills in ((1, 10), (7, 2), (99, 1)):
        module = fit_toy(module_of(TeachersAhead(every), **arguments), ToyPoints(), 10)
        found.append(w(module))
        report = module.teachers.report()
        assert report["every"] == every and report["fills"] == fills * len(TASKS)
        assert report["forwards"] == dict.fromkeys(TASKS, 80)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    still = fit_toy(module_of(views=None, **arguments), ToyPoints(), 10)
    assert (found[0] - 0.3).abs().max() > 0.01 and (w(still) - found[0]).abs().max() > 1e-3


@pytest.mark.parametrize("copy", [WholeCopy(), pytest.param(BlockCopy(), marks=pytest.mark.slow)], ids=str)
def test_hidden_states_of_texts_of_other_lengths(copy):
    """The teacher's positions are those of its own task's batch, and padding counts nowhere."""
    found = []
    for every in (1, 4):
        watching = Watching(LogitAlignment(), HiddenAlignment([1, -1]))
        module = descending(
            ToyLanguage(), toy_vectors(), partial(LayerWise, init=0.3), watching, 0.1, teachers=TeachersAhead(every),
            views=OtherTokens(), hold=False, copy=copy,
        )  # fmt: skip
        found.append(w(toy_fit(module, ToyTexts(), 6)))
        merged = module.merged
        for task, batch in watching.seen[-2:]:
            merged.fill_expert(task)
            with torch.no_grad():
                right = merged(batch.inputs, (1, -1))
            assert torch.equal(batch.teacher.logits, right.features)
            assert all(torch.equal(*states) for states in zip(batch.teacher.hidden, right.hidden, strict=True))
    assert torch.equal(found[0], found[1])


def test_an_expert_merged_with_itself_has_no_loss():
    """From a base of zeros the task vector is the expert to the bit, and one pass has the shapes of the other."""
    _, experts = weights_of(("one",))
    base = {name: torch.zeros_like(value) for name, value in experts["one"].items()}
    module = descending(
        ToyClassifier(), TaskVectors(base, experts), partial(LayerWise, init=1.0), LogitAlignment(), 1e-9,
        views=Noise(), hold=False,
    )  # fmt: skip
    fit_toy(module, ToyPoints(("one",)), 1)
    assert float(module.evaluation.losses["one"]) == 0.0
    apart = module_of(None)
    fit_toy(apart, ToyPoints(), 1)
    assert float(apart.evaluation.losses["one"]) > 0.01


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_fit_resumed_inside_a_span_is_bit_equal(workers, tmp_path):
    """Spans of 4 of 10 steps; step 6 is within the second. How far ahead is the run's, whatever the memory is by then."""
    settings = {**QUIET, "enable_checkpointing": True, "max_steps": 10, "max_epochs": 1}
    settings["default_root_dir"] = str(tmp_path)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    whole = module_of(TeachersAhead(memory=4 * 192), hold=True)
    Trainer(**settings, callbacks=[keep]).fit(whole, ToyPoints(workers=workers))
    assert whole.teachers.report()["every"] == 4
    resumed = module_of(TeachersAhead(memory=1), hold=True)
    Trainer(**settings).fit(resumed, ToyPoints(workers=workers), ckpt_path=tmp_path / "step=6.ckpt", weights_only=True)
    assert resumed.teachers.report()["every"] == 4
    assert resumed.teachers.report()["forwards"] == dict.fromkeys(TASKS, 4 * 8), "of the last four steps alone"
    assert resumed.teachers.report()["fills"] == 2 * 2
    assert torch.equal(w(resumed), w(whole))
    other = module_of(TeachersAhead(memory=1), hold=True)
    fit_toy(other, ToyPoints(), 10)
    assert other.teachers.report()["every"] == 1, "the number is not the class's"


def test_how_far_ahead_comes_from_the_memory_and_is_told_before_the_fit(capsys):
    """Outputs of a step: two tasks, 8 samples, 3 logits of 4 bytes, 192 bytes."""
    for memory, every in ((192 * 3 + 191, 3), (191, 1)):
        module = module_of(TeachersAhead(memory=memory))
        fit_toy(module, ToyPoints(), 5)
        assert module.teachers.report()["every"] == every
        assert module.teachers.state_dict() == {"every": every}
        told = capsys.readouterr().out
        assert told.startswith(f"teachers run ahead: every {every} steps each of 2 experts is filled once")
        assert "a step of 16 samples costs 16 expert forward passes on top" in told and "192 B a step" in told
        assert "of model.teachers.memory" in told
    automatic = fit_toy(module_of(), ToyPoints(), 5)
    assert automatic.teachers.report()["every"] == 5 and "1/8 of what is available" in capsys.readouterr().out
    fit_toy(module_of(objective=Entropy()), ToyPoints(), 5)
    assert capsys.readouterr().out == "", "nothing is taught"


def test_outputs_of_steps_that_are_over_are_let_go():
    module = module_of(TeachersAhead(4))
    kept = []
    step = module.search.step
    module.search.step = lambda *given: (kept.append(sorted(module.teachers._kept)), step(*given))[1]
    fit_toy(module, ToyPoints(), 6)
    assert kept == [[0, 1, 2, 3], [1, 2, 3], [2, 3], [3], [4, 5], [5]]


def test_views_without_teachers_are_seen_too():
    found = [w(fit_toy(module_of(objective=Entropy(), views=view), ToyPoints(), 5)) for view in (None, Noise())]
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_without_views_they_say_what_a_cache_says():
    cached, ahead = (
        w(fit_toy(module_of(teachers, views=None, lr=1e-3), ToyPoints(), 5)) for teachers in (None, TeachersAhead(2))
    )
    assert (cached - ahead).abs().max() <= 1e-6 < (cached - 0.3).abs().max()


def test_labels_are_out_of_reach():
    found = [w(fit_toy(module_of(), ToyPoints(wrong_labels=wrong), 4)) for wrong in (False, True)]
    assert torch.equal(*found)


def test_the_largest_logits_alone():
    watching = Watching(LogitAlignment())
    fit_toy(module_of(TeachersAhead(2, top=2, dtype="float16"), watching), ToyPoints(), 3)
    for _, batch in watching.seen:
        assert batch.teacher.logits.shape == batch.teacher.classes.shape == (8, 2)
        assert batch.teacher.logits.dtype == torch.float16 and float(batch.teacher.logits.max()) == 0.0


def test_a_search_for_masks_halves_what_both_have_seen(tmp_path):
    """Each half has the teachers of its own samples: how far ahead changes no bit there either."""
    found = []
    for every in (1, 3):
        module = bilevel(
            ToyClassifier(), vectors_of(), partial(Concrete, inner=LayerWise), LogitAlignment(), lr=0.5, inner_lr=0.2,
            views=Noise(), teachers=TeachersAhead(every),
        )  # fmt: skip
        fit_toy(module, ToyPoints(), 5)
        found.append(torch.cat([value.flatten() for value in module.merged.parametrization.state_dict().values()]))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("teachers", [TeacherCache(), TeacherFiles()])
def test_outputs_of_samples_are_refused_for_views(teachers):
    with pytest.raises(ConfigError, match="runs a sample once, and model.views changes it") as raised:
        fit_toy(module_of(teachers), ToyPoints(), 1)
    assert "TeachersAhead" in str(raised.value)


def test_labels_of_samples_are_refused_for_views():
    with pytest.raises(ConfigError, match="CrossEntropy learns from labels"):
        fit_toy(module_of(objective=CrossEntropy()), ToyPoints(labelled=True), 1)


@pytest.mark.parametrize("arguments", [{"every": 0}, {"memory": 0}, {"top": 1}, {"dtype": "int3"}])
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ConfigError, match="TeachersAhead"):
        TeachersAhead(**arguments)


SCRIPT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/training"]
import torch
from lightning import Trainer
from test_teachers_ahead import QUIET, TeachersAhead, ToyPoints, module_of, w

torch.set_num_threads(1)
module = module_of(TeachersAhead(memory=192), hold=True)
parallel = {"devices": 2, "strategy": "ddp"} if sys.argv[3] == "2" else {"devices": 1}
trainer = Trainer(**QUIET, max_steps=4, max_epochs=1, **parallel)
trainer.fit(module, ToyPoints())
torch.save((w(module), module.teachers.report()), f"{sys.argv[2]}_{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    """Each runs the experts on its own samples; a step's outputs take half as much in each, so both run two steps ahead."""
    (tmp_path / "fit.py").write_text(SCRIPT)
    for name, devices in (("alone", 1), ("both", 2)):
        done = child([tmp_path / "fit.py", Path(__file__).parents[1], name, devices], tmp_path, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("alone_0", "both_0", "both_1"))
    assert torch.equal(first[0], second[0]) and (first[0] - alone[0]).abs().max() <= 1e-6
    assert alone[1]["every"] == 1 and first[1]["every"] == second[1]["every"] == 2
    assert first[1]["forwards"] == second[1]["forwards"] == dict.fromkeys(TASKS, 16)
    assert (alone[0] - 0.3).abs().max() > 1e-2
