"""Teacher caches: every (expert, sample) runs once, also after a kill; what comes back is what the expert says."""

from functools import partial
from unittest import mock

import pytest
import torch
from modules import descending
from taught import module_of, other_expert, w
from toys import ToyLanguage, ToyTexts, toy_fit, toy_vectors, toy_weights

from adamerge import LayerWise
from adamerge.backbones.inputs import stack
from adamerge.errors import ConfigError
from adamerge.objectives import Entropy, HiddenAlignment, LogitAlignment, Sum
from adamerge.task_vectors.memory import Available
from adamerge.training import TeacherCache, TeacherFiles


@pytest.mark.parametrize("steps", [1, 3, 9])
def test_each_sample_of_the_steps_is_run_once_by_its_own_expert(steps):
    """Ten samples, four a step: one step uses four, three steps all, nine steps most of them several times."""
    module, data = module_of(), ToyTexts()
    toy_fit(module, data, steps)
    backbone = module.merged.backbone
    expected = min(4 * steps, 10)
    assert module.teachers.report()["forwards"] == {"one": expected, "two": expected}
    _, experts = toy_weights(("one", "two"))
    for task, expert in experts.items():
        bias = float(expert["blocks.0.bias"][0])
        rows = [row for found, row in backbone.taught if found == bias]
        own = {tuple(row) for row in data.rows(task, "calibration")["tokens"]}
        cut = [next(length for length in own if row[: len(length)] == length) for row in rows]
        assert len(rows) == expected and len(set(cut)) == expected
    assert len(backbone.taught) == 2 * expected
    assert backbone.samples_seen == 2 * expected + 8 * steps


class Wide(ToyLanguage):
    """Remembers how wide each pass is."""

    def __init__(self):
        super().__init__()
        self.widths = []

    def encode(self, inputs, hidden=()):
        if not torch.is_grad_enabled():
            self.widths.append(inputs["tokens"].shape[1])
        return super().encode(inputs, hidden)


@pytest.mark.parametrize("kind", [TeacherCache, TeacherFiles])
def test_samples_of_like_length_are_run_together(kind, tmp_path):
    """Ten samples in passes of 4, 4 and 2: as wide as the longest, the fifth and the ninth."""
    module, data = module_of(kind(), backbone=Wide()), ToyTexts()
    toy_fit(module, data, 9, default_root_dir=str(tmp_path))
    expected = []
    for task in ("one", "two"):
        lengths = sorted(map(len, data.rows(task, "calibration")["tokens"]), reverse=True)
        expected += lengths[::4]
    assert module.merged.backbone.widths == expected and len(set(expected)) > 3


def test_only_what_the_objective_needs_is_run():
    module = module_of(objective=Entropy())
    toy_fit(module, ToyTexts())
    assert not module.merged.backbone.taught and module.teachers.report()["forwards"] == {}


def test_a_second_objective_without_teacher_sees_none_of_the_first():
    data, taught = ToyTexts(), module_of()
    toy_fit(taught, data)
    plain = module_of(objective=Entropy())
    toy_fit(plain, data)
    assert data.steps()[0]["one"].teacher is None


@pytest.mark.parametrize("kind", [TeacherCache, TeacherFiles])
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_what_the_expert_says(kind, workers, tmp_path):
    objective = Sum([LogitAlignment(), HiddenAlignment([2, 0])])
    seen = []

    class Watching(Sum):
        def prepare(self, task, batch, predict):
            seen.append((task, batch))
            return super().prepare(task, batch, predict)

    watching = Watching(objective.parts)
    module, data = module_of(kind(), watching), ToyTexts(workers=workers)
    toy_fit(module, data, default_root_dir=str(tmp_path))
    assert len(seen) == 6
    merged = module.merged
    for task, batch in seen:
        merged.fill_expert(task)
        with torch.no_grad():
            right = merged(batch.inputs, (2, 0))
        counts, length = batch.inputs["counts"], batch.teacher.logits.shape[1]
        assert counts.sum() == counts[:, :length].sum()
        places = counts[:, :length]
        for ours, theirs in zip(
            (batch.teacher.logits, *batch.teacher.hidden), (right.features, *right.hidden), strict=True
        ):
            assert torch.allclose(ours[places], theirs[:, :length][places], atol=1e-6)


def test_kinds_and_workers_change_nothing(tmp_path):
    found = [
        w(toy_fit(module_of(teachers), ToyTexts(workers=workers), 5, default_root_dir=str(tmp_path)))
        for teachers, workers in (
            (None, 0),
            (TeacherCache(), 1),
            (TeacherFiles(), 0),
            (TeacherFiles(folder=tmp_path / "x"), 1),
        )
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert (found[0] - 0.3).abs().max() > 1e-3, "something was learned"


def test_one_cache_for_two_fits_serves_each_its_own_experts(tmp_path):
    teachers, found = TeacherFiles(folder=tmp_path), []
    for shared in (None, teachers):
        if shared is not None:
            toy_fit(module_of(shared), ToyTexts())
        other, data = other_expert(tmp_path / "elsewhere")
        other.teachers = shared or other.teachers
        found.append(w(toy_fit(other, data)))
    assert teachers.report()["forwards"] == {"one": 10, "two": 0}
    assert torch.equal(*found)


def test_the_largest_logits_alone_learn_nearly_the_same():
    """Eight of eleven classes hold most of the mass; two do not."""
    whole, eight = (w(toy_fit(module_of(TeacherCache(top=top)), ToyTexts(), 5)) for top in (None, 8))
    half = w(toy_fit(module_of(TeacherCache(dtype="float16")), ToyTexts(), 5))
    assert (whole - half).abs().max() < 1e-3 < (whole - 0.3).abs().max()
    assert 0 < (whole - eight).abs().max() < 0.5 * (whole - 0.3).abs().max()


def test_a_task_without_an_expert_is_refused_only_where_it_is_needed():
    data = ToyTexts(("one", "two", "three"))
    with pytest.raises(ConfigError, match="'three' has no expert"):
        toy_fit(module_of(), data)
    toy_fit(module_of(objective=Entropy()), data)


@pytest.mark.parametrize("arguments", [{"top": 1}, {"top": 0}, {"dtype": "int8"}])
def test_arguments_out_of_range_are_refused(arguments):
    with pytest.raises(ConfigError, match="TeacherFiles"):
        TeacherFiles(**arguments)


def test_teachers_leave_no_trace_in_the_merged_copy():
    """Names that are not merged are the base's again after experts have filled the network."""
    backbone = ToyLanguage()
    vectors = toy_vectors(exclude=["embed.*"])
    module = descending(backbone, vectors, partial(LayerWise, init=0.0), LogitAlignment(), 1e-9)
    toy_fit(module, ToyTexts(), 1)
    module.merged.merge()
    assert all(torch.allclose(value, vectors.base[name], atol=1e-6) for name, value in backbone.tensors().items())


def test_stacked_inputs_are_padded_like_teachers():
    data = ToyTexts()
    data.serve(ToyLanguage())
    samples = data.samples("one", "calibration")
    inputs = stack([samples[i] for i in range(10)])
    assert inputs["counts"].any(dim=1).all() and not inputs["counts"].all()


@pytest.mark.parametrize("top", [None, 2])
def test_outputs_that_no_memory_holds_are_refused_before_most_are_computed(top, monkeypatch):
    module, data = module_of(TeacherCache(top)), ToyTexts()
    toy_fit(module, data, 9)
    taken = module.teachers.report()["bytes"]
    kept = [module.teachers._memory[task, index] for task in ("one", "two") for index in range(10)]
    assert taken == sum(value.numel() * value.element_size() for one in kept for value in one.values())

    again = module_of(TeacherCache(top))
    there = mock.Mock()
    monkeypatch.setattr("adamerge.training.teacher_cache.Available", there)
    there.on.return_value = Available(host=2 * taken, device=0)
    toy_fit(again, ToyTexts(), 9)  # what the first batch tells is not exact: texts have holes
    less = module_of(TeacherCache(top))
    there.on.return_value = Available(host=taken // 2, device=0)
    with pytest.raises(ConfigError, match="outputs would take about .* of memory, .* are available"):
        toy_fit(less, ToyTexts(), 9)
    assert sum(less.teachers.report()["forwards"].values()) == 0 and less.teachers.report()["bytes"] == 0
