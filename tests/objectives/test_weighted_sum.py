"""Sums: the weighted losses and gradients of the parts, each of which sees only what it declares."""

import pytest
import torch

from adamerge.backbones import Batch, Encoded, Output, Teacher
from adamerge.errors import ConfigError
from adamerge.objectives import CrossEntropy, Entropy, HiddenAlignment, LogitAlignment, Objective, Sum


class Recording(Objective):
    """Remembers what it was shown."""

    def __init__(self, labelled=False, taught=False, hidden=(), weights=1.0):
        super().__init__()
        self.labelled, self.taught, self.hidden, self.weights, self.seen = labelled, taught, hidden, weights, []

    def forward(self, output, batch):
        self.seen.append((output, batch))
        return output.logits.sum(dim=-1)

    def prepare(self, task, batch, predict):
        self.seen.append(batch)
        return batch._replace(inputs=2 * batch.inputs + 1)

    def weight(self, batch):
        return self.weights * super().weight(batch)


def made(samples=3, layers=3):
    torch.manual_seed(0)
    states = tuple(torch.randn(samples, 2, 4) for _ in range(2 * layers))
    output = Output(torch.randn(samples, 5, requires_grad=True), Encoded(torch.randn(samples, 4), states[:layers]))
    teacher = Teacher(torch.randn(samples, 5), hidden=states[layers:])
    return output, Batch(torch.randn(samples, 4), torch.tensor([0, 1, 2]), teacher)


def test_it_is_the_weighted_sum_of_the_parts():
    output, batch = made(layers=2)
    logits, states = LogitAlignment(2.0), HiddenAlignment([1, 3])
    both = Sum([logits, states], [0.5, 3.0])
    assert torch.allclose(both(output, batch), 0.5 * logits(output, batch) + 3 * states(output, batch))
    plain = Sum([Entropy(), logits])
    assert torch.allclose(plain(output, batch), Entropy()(output, batch) + logits(output, batch))


def test_needs_are_unions():
    both = Sum([HiddenAlignment([1, -1]), HiddenAlignment([3, 1]), Entropy()])
    assert both.taught and not both.labelled and both.hidden == (1, -1, 3)
    assert Sum([Entropy(), CrossEntropy()]).labelled and not Sum([Entropy()]).taught


def test_each_part_sees_its_own_hidden_states_in_its_own_order():
    output, batch = made(layers=3)
    one, other = Recording(taught=True, hidden=(7, 2)), Recording(taught=True, hidden=(5, 7))
    Sum([one, other])(output, batch)  # asks for 7, 2, 5
    for part, expected in ((one, (0, 1)), (other, (2, 0))):
        ((seen, taught),) = part.seen
        for states, source in (
            (seen.encoded.hidden, output.encoded.hidden),
            (taught.teacher.hidden, batch.teacher.hidden),
        ):
            assert len(states) == 2 and all(states[i] is source[place] for i, place in enumerate(expected))


def test_labels_and_teachers_reach_only_those_that_declare_them():
    output, batch = made(layers=0)
    parts = [Recording(), Recording(labelled=True), Recording(taught=True)]
    both = Sum(parts)
    both(output, both.prepare("task", batch, lambda inputs: output))
    for part in parts:
        prepared, (_, shown) = part.seen
        for seen in (prepared, shown):
            assert (seen.labels is not None) == part.labelled and (seen.teacher is not None) == part.taught


def test_preparations_are_chained_and_keep_labels_and_teacher():
    output, batch = made(layers=0)
    prepared = Sum([Recording(), Recording(labelled=True), Recording(taught=True)]).prepare(
        "task", batch, lambda _: output
    )
    assert torch.equal(prepared.inputs, 2 * (2 * (2 * batch.inputs + 1) + 1) + 1)
    assert torch.equal(prepared.labels, batch.labels) and prepared.teacher is batch.teacher


def test_every_part_begins():
    begun = []

    class Beginning(Recording):
        def begin(self, course):
            begun.append(course)

    Sum([Beginning(), Entropy(), Beginning()]).begin("course")
    assert begun == ["course", "course"]


def test_a_part_that_takes_other_samples_is_refused_beside_one_that_knows_these():
    class Choosing(Recording):
        def prepare(self, task, batch, predict):
            return batch._replace(inputs=batch.inputs.flip(0), indices=torch.tensor([2, 1, 0]))

    output, batch = made(layers=0)
    batch = batch._replace(indices=torch.arange(3))
    Sum([Choosing(), Entropy()]).prepare("task", batch._replace(labels=None, teacher=None), lambda _: output)
    for other in (Recording(taught=True), Recording(labelled=True)):
        with pytest.raises(ConfigError, match="Choosing chooses other samples"):
            Sum([other, Choosing()]).prepare("task", batch, lambda _: output)


def test_weights_multiply():
    _, batch = made(layers=0)
    assert Sum([Recording(weights=2.0), Entropy(), Recording(weights=0.25)]).weight(batch).tolist() == [0.5] * 3


def test_modules_inside_follow_the_model():
    part = Recording()
    part.register_buffer("table", torch.zeros(2))
    assert Sum([Entropy(), part]).to(torch.bfloat16).parts[1].table.dtype == torch.bfloat16


@pytest.mark.parametrize(("parts", "factors"), [([], None), ([Entropy()], [1.0, 2.0]), ([Entropy()], [])])
def test_parts_and_factors_must_match(parts, factors):
    with pytest.raises(ConfigError, match="one factor per part"):
        Sum(parts, factors)
