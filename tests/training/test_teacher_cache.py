"""Teacher caches: every (expert, sample) runs once, also after a kill; what comes back is what the expert says."""

import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from modules import descending
from rounding import allowed
from running import environment
from torch.optim import SGD
from toys import QUIET, WIDTH, ToyLanguage, ToyTexts, forward, toy_fit, toy_vectors, toy_weights

from adamerge import LayerWise
from adamerge.backbones.inputs import stack
from adamerge.data.batch_order import Steps
from adamerge.errors import ConfigError
from adamerge.objectives import Entropy, HiddenAlignment, LogitAlignment, Sum
from adamerge.training import TeacherCache, TeacherFiles


class Counting(ToyLanguage):
    """Remembers for which filling each sample was run without a gradient: nothing else does that in a fit."""

    def __init__(self):
        super().__init__()
        self.taught = []

    def encode(self, inputs, hidden=()):
        if not torch.is_grad_enabled():
            bias = float(self.network.blocks[0].bias[0])
            self.taught += [(bias, tuple(row.tolist())) for row in inputs["tokens"]]
        return super().encode(inputs, hidden)


def module_of(teachers=None, objective=None, backbone=None, tasks=("one", "two"), **arguments):
    arguments = {"hold": False, **arguments}  # where forward passes are counted
    return descending(
        backbone or Counting(), toy_vectors(tasks), partial(LayerWise, init=0.3), objective or LogitAlignment(),
        0.1, partial(SGD, lr=1.0), teachers=teachers, **arguments,
    )  # fmt: skip


def w(module):
    return module.merged.parametrization.w.detach()


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


def test_files_are_found_again_by_another_fit(tmp_path):
    for expected in ({"one": 10, "two": 10}, {"one": 0, "two": 0}):
        module = module_of(TeacherFiles(folder=tmp_path))
        toy_fit(module, ToyTexts())
        report = module.teachers.report()
        assert report["forwards"] == expected and {k: 10 - v for k, v in expected.items()} == report["found"]
    assert module.merged.backbone.taught == []


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


def other_top(tmp_path):
    return module_of(TeacherFiles(top=3, folder=tmp_path)), ToyTexts()


def other_layers(tmp_path):
    return module_of(TeacherFiles(folder=tmp_path), HiddenAlignment([1])), ToyTexts()


def other_expert(tmp_path):
    module = module_of(TeacherFiles(folder=tmp_path))
    expert = module.merged.task_vectors.checkpoints["one"]
    moved = {name: expert[name] * 1.01 for name in expert}
    from adamerge.checkpoints.opening import open_checkpoint

    module.merged.task_vectors.checkpoints["one"] = open_checkpoint(moved)
    return module, ToyTexts()


def other_data(tmp_path):
    class Shifted(ToyTexts):
        def load(self, task):
            splits = super().load(task)
            if task == "two":
                return splits
            return {
                name: rows.map(lambda row: {"tokens": [t // 2 for t in row["tokens"]]}) for name, rows in splits.items()
            }

    return module_of(TeacherFiles(folder=tmp_path)), Shifted()


@pytest.mark.parametrize("change", [other_top, other_layers, other_expert, other_data])
def test_files_of_something_else_are_not_used(change, tmp_path):
    toy_fit(module_of(TeacherFiles(folder=tmp_path)), ToyTexts())
    module, data = change(tmp_path)
    toy_fit(module, data)
    forwards = module.teachers.report()["forwards"]
    assert forwards["one"] == 10 and forwards["two"] == (0 if change in (other_expert, other_data) else 10)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "gone"])
def test_damaged_files_are_made_again(damage, tmp_path):
    right = w(toy_fit(module_of(TeacherFiles(folder=tmp_path)), ToyTexts()))
    path = sorted(tmp_path.rglob("*.safetensors"))[0]
    content = path.read_bytes()
    path.write_bytes({"truncated": content[:-9], "garbage": b"\7" * 99, "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    module = module_of(TeacherFiles(folder=tmp_path))
    assert torch.equal(w(toy_fit(module, ToyTexts())), right)
    assert 0 < sum(module.teachers.report()["forwards"].values()) <= 4


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from functools import partial
from torch.optim import SGD
from toys import ToyLanguage, ToyTexts, toy_fit, toy_vectors
from modules import descending
from adamerge import LayerWise, LogitAlignment, TeacherFiles

plain = ToyLanguage.encode

def dying(self, inputs, hidden=()):
    if self.samples_seen >= 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, inputs, hidden)

ToyLanguage.encode = dying
vectors = toy_vectors()
teachers = TeacherFiles(folder=sys.argv[2])
module = descending(ToyLanguage(), vectors, partial(LayerWise, init=0.3), LogitAlignment(), teachers=teachers)
toy_fit(module, ToyTexts(), 9)
"""


@pytest.mark.slow
def test_a_killed_job_runs_none_of_them_twice(tmp_path):
    """Killed after four forward passes: 4, 4 and 2 of the first task and 4 of the second, all complete."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    folder = tmp_path / "teachers"
    line = [sys.executable, str(script), str(Path(__file__).parents[1]), str(folder)]
    ended = subprocess.run(line, env=environment(), capture_output=True, timeout=100, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    module = module_of(TeacherFiles(folder=folder), backbone=ToyLanguage())
    toy_fit(module, ToyTexts(), 9)
    assert module.teachers.report()["found"] == {"one": 10, "two": 4}
    assert module.teachers.report()["forwards"] == {"one": 0, "two": 6}
    assert torch.equal(w(module), w(toy_fit(module_of(), ToyTexts(), 9)))


def test_the_identity_can_be_read_by_a_person(tmp_path):
    toy_fit(module_of(TeacherFiles(folder=tmp_path)), ToyTexts())
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*/identity.json")]
    assert {entry["task"] for entry in found} == {"one", "two"} and all(len(entry["expert"]) == 64 for entry in found)
    assert not [path for path in tmp_path.rglob("*") if ".adamerge-" in path.name]


def test_two_processes_share_the_samples_without_overlap():
    samples = ToyTexts()
    samples.serve(ToyLanguage())

    def steps(rank):
        return Steps(
            {"one": samples.samples("one", "calibration")}, None, batch_size=4, seed=0, total=9, rank=rank, world_size=2
        )

    shares = [TeacherFiles()._wanted("one", steps(rank)) for rank in (0, 1)]
    assert sorted(shares[0] + shares[1]) == list(range(10)) and abs(len(shares[0]) - len(shares[1])) <= 1
    own = [set(TeacherCache()._wanted("one", steps(rank))) for rank in (0, 1)]
    for rank in (0, 1):
        used = {int(i) for step in range(9) for i in steps(rank)[step]["one"].indices}
        assert own[rank] == used


class Backwards(ToyTexts):
    """The same samples, which have other numbers."""

    def load(self, task):
        return {split: rows.select(range(len(rows))[::-1]) for split, rows in super().load(task).items()}


def as_they_are(task, batch):
    """No views."""
    return batch


class OfTwo:
    """Stands for the strategy of one of two processes."""

    precision_plugin = Trainer(**QUIET).strategy.precision_plugin

    def barrier(self, name):
        """Both are there."""


def test_a_sample_of_an_earlier_fit_under_the_same_number_is_not_taken_for_this_ones(tmp_path):
    """Two processes read all files of the folder, and a file of either fit may come last; batches differ."""
    module, expert = module_of(), {name: value.double() for name, value in toy_weights(("one",))[1]["one"].items()}
    module.merged.fill(module.merged.task_vectors.base.__getitem__)
    for kind in (ToyTexts, Backwards, ToyTexts, Backwards):
        data = kind()
        data.serve(module.merged.backbone)
        module.merged.backbone.build_heads(data.tasks, module.merged.task_vectors.checkpoints)
        steps = Steps({"one": data.samples("one", "calibration")}, None, batch_size=4, seed=0, total=9, world_size=2)
        for rank in (1, 0):
            steps.rank = rank
            cache = TeacherFiles(folder=tmp_path)
            cache.begin(
                module.merged, steps, (), show=as_they_are, batch_size=4, strategy=OfTwo(), default_folder=tmp_path
            )
        wanted = TeacherCache()._wanted("one", steps)
        assert len(wanted) > 5
        for index in wanted:
            sample = steps.samples["one"][index]
            right, slack = allowed(
                lambda disturb, tokens=sample["tokens"]: forward({n: disturb(v) for n, v in expert.items()}, tokens)[1],
                WIDTH + 4,
            )
            counted, found = sample["counts"], cache("one", index).logits.double()
            assert slack < 1e-4 and (found[counted[: len(found)]] - right[counted]).abs().max() <= slack


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


def test_a_network_that_hides_its_arguments_cannot_be_found_again(tmp_path):
    class Secretive(Counting):
        def __init__(self, size=3):
            super().__init__()

    with pytest.raises(ConfigError, match="Secretive"):
        toy_fit(module_of(TeacherFiles(folder=tmp_path), backbone=Secretive()), ToyTexts())
    toy_fit(module_of(backbone=Secretive()), ToyTexts())


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
