"""Length groups: what runs together is of like length, and losses, gradients and teachers are those of one padded pass."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from modules import descending
from pico import TASKS
from rounding import gamma
from running import child
from toys import ToyLanguage, ToyTexts, toy_fit, toy_vectors

from adamerge.backbones import IGNORED, Batch, Teacher
from adamerge.backbones.inputs import count, join, rows, stack, stack_tensors
from adamerge.backbones.lengths import lengths_of, longest_first
from adamerge.merging.block_copy import BlockCopy
from adamerge.merging.copies import WholeCopy
from adamerge.merging.merged_model import MergedModel
from adamerge.objectives import CrossEntropy, Entropy, HiddenAlignment, LogitAlignment, Sum, View
from adamerge.parametrizations import LayerWise
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training import TeachersAhead, length_groups
from adamerge.training.length_groups import grouped
from adamerge.training.objective_gradient import BatchObjective

ALONE = SimpleNamespace(reduce=lambda totals, reduce_op: totals, world_size=1)
WHOLE = SimpleNamespace(copy=WholeCopy(), device=torch.device("cpu"))
BLOCKS = SimpleNamespace(copy=BlockCopy(), device=torch.device("cpu"))
NEVER = 1 << 30


@pytest.fixture
def cost(monkeypatch):
    """Sets what a pass costs, in positions."""
    return partial(monkeypatch.setattr, length_groups, "PASS_ON_CPU")


def texts(*lengths, first=0):
    """A batch of texts of these lengths, each of its own number, with all that can go with a sample."""
    samples = [
        {"input_ids": torch.full((length,), first + n), "attention_mask": torch.ones(length)}
        for n, length in enumerate(lengths)
    ]
    numbers = torch.arange(first, first + len(lengths))
    teacher = Teacher(numbers[:, None] + 0.5, numbers[:, None] + 7, (numbers[:, None, None] + 0.25,))
    return Batch(
        stack(samples), numbers + 1, teacher, numbers, 3, numbers[:, None] + 2.0, None, numbers % 2 == 0,
        lengths_of(samples),
    )  # fmt: skip


def widths(groups):
    """Of each pass, its samples and how wide they are padded."""
    return [tuple(inputs["input_ids"].shape) for inputs, _ in groups.passes()]


def test_a_pass_is_cut_where_that_saves_most(cost):
    """Ten and two of ten, three of two: 15 x 10 positions, cut into 12 x 10 and 3 x 2, which saves 24."""
    batch = {"a": texts(*[10] * 10, 2, 2), "b": texts(10, 2, 10)}
    cost(23)
    assert widths(grouped(batch, None, WHOLE)) == [(12, 10), (3, 2)]
    cost(24)
    assert widths(grouped(batch, None, WHOLE)) == [(15, 10)], "a cut must save more than a pass costs"


def test_each_piece_is_cut_again(cost):
    """Of lengths 40, 40, 10, 10, 1: at 10, then at 1."""
    batch = {"a": texts(10, 40, 1, 40, 10)}
    for price, expected in (
        (8, [(2, 40), (2, 10), (1, 1)]),
        (9, [(2, 40), (3, 10)]),
        (89, [(2, 40), (3, 10)]),
        (90, [(5, 40)]),
    ):
        cost(price)
        assert widths(grouped(batch, None, WHOLE)) == expected, price


def test_no_other_cut_in_two_saves_more():
    """Lengths of encoder and decoder, and every place tried by hand."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        positions = torch.randint(1, 30, (2, 9), generator=generator)
        order = longest_first(positions)

        def padded(part, positions=positions):
            return len(part) * int(sum(each[part].max() for each in positions))

        saved = [padded(order) - padded(order[:place]) - padded(order[place:]) for place in range(1, 9)]
        pieces = length_groups._cut(order, positions, max(saved) - 1)
        assert len(pieces[0]) in [place for place, value in enumerate(saved, 1) if value == max(saved)]
        assert length_groups._cut(order, positions, max(saved))[0] is order


@pytest.mark.parametrize("merged", [WHOLE, BLOCKS], ids=["whole", "blocks"])
@pytest.mark.parametrize("most", [None, 1, 2, 3, 5])
def test_every_sample_runs_once_with_all_that_is_its_own(merged, most, cost):
    cost(3)
    batch = {"a": texts(3, 9, 1, 9), "b": texts(2, 8, 8, first=10), "c": texts(1, 30, first=20)}
    groups = grouped(batch, most, merged)
    seen = []
    for inputs, parts in groups.passes():
        assert most is None or count(inputs) <= most
        for task, places, samples in parts:
            own = groups.batch[task].rows(samples)
            assert own.labels.tolist() == [n + 1 for n in own.indices.tolist()]
            assert own.teacher.logits[:, 0].tolist() == [n + 0.5 for n in own.indices.tolist()]
            assert own.teacher.classes[:, 0].tolist() == [n + 7 for n in own.indices.tolist()]
            assert own.teacher.hidden[0][:, 0, 0].tolist() == [n + 0.25 for n in own.indices.tolist()]
            assert own.targets[:, 0].tolist() == [n + 2 for n in own.indices.tolist()]
            assert own.agreed.tolist() == [n % 2 == 0 for n in own.indices.tolist()] and own.step == 3
            for number, ids in zip(own.indices.tolist(), inputs["input_ids"][places], strict=True):
                there = batch[task].indices.tolist().index(number)
                length = int(batch[task].lengths["input_ids"][there])
                assert ids[:length].tolist() == [number] * length and not ids[length:].any()
                seen.append(number)
    assert sorted(seen) == [0, 1, 2, 3, 10, 11, 12, 20, 21]
    passes = len(groups.sizes)
    if merged is BLOCKS:
        assert passes == -(-9 // (most or 9)), "each pass merges anew: no more of them than asked for"
    if groups.order is not None:
        for task, part in groups.batch.items():
            assert torch.equal(part.indices, batch[task].indices[groups.order[task]])


def test_micro_batches_are_padded_each_to_its_own_longest():
    """Nine samples in threes, of 9 x 30 positions before: two tasks' longest, then what follows them."""
    batch = {"a": texts(3, 9, 1, 9), "b": texts(2, 8, 8, first=10), "c": texts(1, 30, first=20)}
    assert widths(grouped(batch, 3, BLOCKS)) == [(3, 30), (3, 8), (3, 2)]


@pytest.mark.parametrize("most", [None, 2, 4])
def test_images_and_texts_of_one_length_keep_their_order(most, cost):
    cost(0)
    images = {"a": Batch(torch.randn(3, 2, 4, 4)), "b": Batch(torch.randn(2, 2, 4, 4))}
    for batch in (images, {"a": texts(5, 5, 5), "b": texts(5, 5, first=3)}):
        groups = grouped(batch, most, WHOLE)
        assert groups.batch is batch and groups.order is None
        joint = join([part.inputs for part in batch.values()])
        for number, (inputs, _) in enumerate(groups.passes()):
            first = number * (most or 5)
            expected = rows(joint, slice(first, first + (most or 5)))
            both = [inputs, expected] if isinstance(inputs, dict) else [{"": inputs}, {"": expected}]
            assert all(torch.equal(value, both[1][name]) for name, value in both[0].items())


def test_one_pass_is_the_step_as_it_was(cost):
    cost(NEVER)
    batch = {"a": texts(3, 9, 1), "b": texts(30, 2, first=3)}
    groups = grouped(batch, None, WHOLE)
    assert groups.batch is batch and groups.order is None
    ((inputs, parts),) = groups.passes()
    joint = join([part.inputs for part in batch.values()])
    assert all(torch.equal(value, joint[name]) for name, value in inputs.items())
    assert parts == [("a", slice(0, 3), slice(0, 3)), ("b", slice(3, 5), slice(0, 2))]


def test_of_unknown_lengths_nothing_is_cut_off(cost):
    """They may fill the inputs; the other task's are known and run apart."""
    cost(0)
    batch = {"a": texts(3, 9)._replace(lengths=None), "b": texts(1, 2, first=2)}
    assert widths(grouped(batch, None, WHOLE)) == [(2, 9), (1, 2), (1, 1)]


SAMPLES = {
    "llama": [
        {"prompt": "a" * before, "response": "bc" * after} for before, after in ((1, 9), (12, 1), (3, 2), (2, 4))
    ],
    "sentence": ["abc", "defgh" * 5, "i", "jklmn" * 3],
    "bert": ["abc", "defgh" * 5, "i", "jklmn" * 3],
    "t5": [{"prompt": "a" * before, "response": "bc" * after} for before, after in ((1, 9), (22, 1), (3, 2), (12, 7))],
}


class Remembering(Sum):
    """Remembers the loss of each sample by its number."""

    def forward(self, output, batch):
        found = super().forward(output, batch)
        self.losses.update(zip(batch.indices.tolist(), found.detach().tolist(), strict=True))
        return found


def of_kind(kind, pool):
    """A network in float64 with a batch of two tasks, and teachers and labels of all samples."""
    vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"], exclude=pool["exclude"])
    backbone = pool["backbone"]()
    backbone.network.double()
    backbone.dtype = "float64"  # of the heads
    merged = MergedModel(backbone, vectors, LayerWise(vectors, init=0.3))
    backbone.build_heads(TASKS, vectors.checkpoints)
    hidden, batch = (0, 1, -1), {}
    for number, task in enumerate(TASKS):
        samples = [backbone.preprocess(sample) for sample in SAMPLES[kind][: 4 - number]]
        if kind in {"llama", "t5"}:
            labels = stack_tensors([backbone.labels(sample) for sample in samples], IGNORED)
        else:
            labels = torch.arange(len(samples)) % 3
        merged.fill_expert(task)
        with torch.no_grad():
            output = backbone.output(merged(stack(samples), hidden), task)
        teacher = Teacher(output.logits, hidden=output.encoded.hidden)
        indices = torch.arange(10 * number, 10 * number + len(samples))
        batch[task] = Batch(stack(samples), labels, teacher, indices, lengths=lengths_of(samples))
    objective = Remembering([CrossEntropy(), LogitAlignment(), HiddenAlignment(hidden)], [1.0, 1.0, 0.1])
    return merged, batch, objective


@pytest.mark.parametrize("kind", SAMPLES)
def test_losses_and_gradients_are_those_of_one_padded_pass(kind, pool_of, cost):
    """Networks in float64: what differs is where ``G`` is rounded to fp32, once in each pass, and what follows."""
    merged, batch, objective = of_kind(kind, pool_of(kind))
    results = []
    for price, most in ((NEVER, None), (0, None), (NEVER, 2), (0, 3)):
        cost(price)
        objective.losses = {}
        merged.merge()
        merged.parametrization.w.grad = None
        found = BatchObjective(merged, objective, {"one": 2.0}, most, ALONE).backward(batch)
        merged.pull_back(found.total).backward()
        passes = len(grouped(batch, most, merged).sizes)
        results.append((found.losses, objective.losses, merged.parametrization.w.grad, passes))
    (totals, each, gradient, passes), *others = results
    assert passes == 1 and all(more > 1 for *_, more in others) and len(each) == 7
    assert len({round(value, 3) for value in each.values()}) == 7, "samples are told apart by their losses"
    # objectives sum over classes and positions in fp32, there and back
    sums = 64 + 48
    bound = 2 * gamma(sums)
    for own_totals, own, _, _ in others:
        assert own.keys() == each.keys()
        assert all(own[index] == pytest.approx(value, rel=bound) for index, value in each.items())
        assert all(float(own_totals[task]) == pytest.approx(float(totals[task]), rel=bound) for task in TASKS)
    # a pass is one addition to G in fp32; behind it are sums over the elements of a tensor
    largest = max(parameter.numel() for parameter in merged.backbone.network.parameters())
    bound = 2 * gamma(2 * sums + max(more for *_, more in others) + largest)
    for *_, found, _ in others:
        assert (found - gradient).abs().max() <= bound * gradient.abs().max()
    for task, factor, numbers in (("one", 2.0, range(4)), ("two", 1.0, range(10, 13))):
        mean = sum(each[number] for number in numbers) / len(numbers)
        assert float(totals[task]) == pytest.approx(factor * mean, rel=2 * gamma(sums))


class Watching(Sum):
    """Remembers the batches that it is given, and how wide each pass is."""

    def __init__(self, *parts):
        super().__init__(parts)
        self.seen, self.widths = [], []

    def prepare(self, task, batch, predict):
        self.seen.append((task, batch))
        return super().prepare(task, batch, predict)

    def forward(self, output, batch):
        self.widths.append(output.mask.shape[1])
        return super().forward(output, batch)


class Same(View):
    """Texts as they are, in tensors of their own."""

    def __init__(self, lengthens):
        self.lengthens = lengthens

    def __call__(self, inputs, seeds):
        return {name: value.clone() for name, value in inputs.items()}


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_teachers_that_run_ahead_follow_their_samples(micro_batch, cost):
    """What an expert makes of a sample beside others of like length is what it makes of it alone."""
    cost(0)
    watching = Watching(LogitAlignment(), HiddenAlignment([1, -1]))
    module = descending(
        ToyLanguage("float64"), toy_vectors(), partial(LayerWise, init=0.3), watching, 0.1, teachers=TeachersAhead(2),
        views=Same(lengthens=False), hold=False, micro_batch=micro_batch,
    )  # fmt: skip
    toy_fit(module, ToyTexts(), 3)
    merged = module.merged
    assert len(watching.seen) == 6 and len(set(watching.widths)) > 2
    for task, batch in watching.seen:
        merged.fill_expert(task)
        teacher = batch.teacher
        for number, length in enumerate(batch.lengths["tokens"].tolist()):
            alone = {name: value[number : number + 1, :length] for name, value in batch.inputs.items()}
            with torch.no_grad():
                right = merged(alone, (1, -1))
            pairs = zip((teacher.logits, *teacher.hidden), (right.features, *right.hidden), strict=True)
            # in float64: layers of six numbers, summed in an order that depends on the number of rows
            assert all((ours[number, :length] - own[0]).abs().max() <= 1e-13 * own.abs().max() for ours, own in pairs)


@pytest.mark.parametrize("lengthens", [True, False])
def test_lengths_are_those_of_a_view_only_if_it_makes_no_sample_longer(lengthens, cost):
    cost(0)
    watching = Watching(LogitAlignment())
    module = descending(
        ToyLanguage(), toy_vectors(), partial(LayerWise, init=0.3), watching, 0.1, views=Same(lengthens), hold=False
    )
    toy_fit(module, ToyTexts(), 3)
    assert all((batch.lengths is None) == lengthens for _, batch in watching.seen)
    widest = [max(batch.inputs["tokens"].shape[1] for _, batch in watching.seen[n : n + 2]) for n in (0, 2, 4)]
    assert (len(watching.widths) > 6) != lengthens and max(watching.widths) == max(widest)


class Longer(Entropy):
    """Adds a token to each text, where padding was."""

    def prepare(self, task, batch, predict):
        inputs = {name: torch.nn.functional.pad(value, (0, 1)) for name, value in batch.inputs.items()}
        places = batch.lengths["tokens"][:, None]
        inputs = {"tokens": inputs["tokens"].scatter(1, places, 5), "counts": inputs["counts"].scatter(1, places, True)}
        self.longer = batch._replace(inputs=inputs)
        return self.longer

    def forward(self, output, batch):
        self.counted += int(output.mask.sum())
        return super().forward(output, batch)


@pytest.mark.parametrize("most", [None, 2])
def test_of_inputs_that_an_objective_has_changed_nothing_is_cut_off(most, cost):
    cost(0)
    data, merged = ToyTexts(("one",)), MergedModel(ToyLanguage(), vectors := toy_vectors(), LayerWise(vectors))
    data.serve(merged.backbone)
    samples = [data.samples("one", "calibration")[n] for n in range(6)]
    batch = {"one": Batch(stack(samples), lengths=lengths_of(samples))}
    merged.merge()
    objective = Longer()
    objective.counted = 0
    found = BatchObjective(merged, objective, {}, most, ALONE).backward(batch).losses["one"]
    assert objective.counted == sum(int(sample["counts"].sum()) + 1 for sample in samples)
    with torch.no_grad():
        output = merged.backbone.output(merged(objective.longer.inputs), "one")
        right = Entropy()(output, objective.longer).mean()
    assert float(found) == pytest.approx(float(right), rel=2 * gamma(11 + 8 + 6))


SCRIPT = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/training"]
from functools import partial
import torch
from lightning import Trainer
from modules import descending
from toys import QUIET, ToyLanguage, ToyTexts, toy_vectors
from adamerge import HiddenAlignment, LayerWise, LogitAlignment, Sum
from adamerge.training import length_groups

torch.set_num_threads(1)
length_groups.PASS_ON_CPU = 0
calls = []
module = descending(
    ToyLanguage(), toy_vectors(), partial(LayerWise, init=0.3), Sum([LogitAlignment(), HiddenAlignment([1])]), 0.1,
    torch.optim.SGD,
)
module.merged.register_forward_pre_hook(lambda *_: calls.append(module.global_step))
parallel = {"devices": 2, "strategy": "ddp"} if sys.argv[3] == "2" else {"devices": 1}
trainer = Trainer(**QUIET, max_steps=4, max_epochs=1, **parallel)
trainer.fit(module, ToyTexts(batch_size=6))
torch.save((module.merged.parametrization.w.detach(), len(calls)), f"{sys.argv[2]}_{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    """Each has samples of other lengths, and other passes of them."""
    (tmp_path / "fit.py").write_text(SCRIPT)
    for name, devices in (("alone", 1), ("both", 2)):
        done = child([tmp_path / "fit.py", Path(__file__).parents[1], name, devices], tmp_path, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("alone_0", "both_0", "both_1"))
    assert torch.equal(first[0], second[0]) and (first[0] - alone[0]).abs().max() <= 1e-6
    assert (alone[0] - 0.3).abs().max() > 1e-2 and alone[1] > 4 * 2
