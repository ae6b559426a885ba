"""Looks at inputs that no step sees: the figures in float64, from the experts' networks; once a step, without labels."""

import math
from functools import partial

import pytest
import torch
from lightning import Callback
from modules import descending
from rounding import allowed
from toy_points import CLASSES, TASKS, ToyClassifier, ToyPoints, fit_toy, logits_of, vectors_of, weights_of
from toys import ToyLanguage, ToyTexts, forward, toy_fit, toy_vectors, toy_weights

from adamerge.data.agreement import Divergence, SameClass
from adamerge.data.labels import TokenLabels
from adamerge.errors import ConfigError
from adamerge.objectives import Entropy
from adamerge.parametrizations import LayerWise
from adamerge.training.held_out import fallen


class Looking(Callback):
    """Keeps the coefficients and the look of each step."""

    def __init__(self):
        self.w, self.looks = {}, {}

    def on_train_start(self, trainer, module):
        self.look(module)

    def on_train_batch_end(self, trainer, module, *rest):
        self.look(module)

    def look(self, module):
        self.w[module.global_step] = module.merged.parametrization.w.detach().clone()
        self.looks[module.global_step] = module.held_out.look(module)


def fitted(data=None, steps=3, **arguments):
    looking = Looking()
    module = descending(ToyClassifier(), vectors_of(), partial(LayerWise, init=0.3), Entropy(), 0.1, **arguments)
    fit_toy(module, data or ToyPoints(rows=100, held_out=0.1), steps, callbacks=[looking])
    return module, looking


def merged_in_float64(w):
    base, experts = weights_of()
    return {
        name: base[name].double()
        + sum(w[k, p].double() * (experts[task][name] - base[name]).double() for k, task in enumerate(TASKS))
        for p, name in enumerate(vectors_of())
    }


def held_out_points(data, task):
    return torch.tensor(data.rows(task, "held_out")["point"][:]).double()


def test_the_figures_are_those_of_the_networks_in_float64():
    data = ToyPoints(rows=100, held_out=0.1)
    module, looking = fitted(data)
    _, experts = weights_of()
    assert list(looking.looks) == [0, 1, 2, 3] and module.held_out.first is looking.looks[0]
    for step, look in looking.looks.items():
        weights = merged_in_float64(looking.w[step])
        for task in TASKS:
            points = held_out_points(data, task)
            own = {name: value.double() for name, value in experts[task].items()}
            ours, theirs = logits_of(weights, task, points), logits_of(own, task, points)
            assert look.agreement[task].tolist() == (ours.argmax(1) == theirs.argmax(1)).double().tolist()
            shares = torch.bincount(ours.argmax(1), minlength=CLASSES) / len(points)
            assert look.top_class_share[task] == pytest.approx(shares.max().item())
            mean = ours.softmax(1).mean(0)
            entropy = -(mean * mean.log()).sum().item() / math.log(CLASSES)
            assert look.marginal_entropy[task] == pytest.approx(entropy, rel=1e-5)
            usual = torch.bincount(theirs.argmax(1), minlength=CLASSES).max().item() / len(points)
            assert module.held_out.experts.top_class_share[task] == pytest.approx(usual)
            assert module.held_out.experts.agreement[task].tolist() == [1.0] * 32
    assert looking.looks[3].agreement["one"].mean() < 1


class HeldTexts(ToyTexts):
    labelling = TokenLabels()

    def __init__(self, **arguments):
        super().__init__(rows=20, **arguments)
        self.held_out = 0.5


ROUNDINGS = 2 + 3 * 6 + 3 * 11
"""Of a merge of two experts, two layers and a head, and sums over classes: of a softmax, of what is kept, of the terms."""


def divergences(task, rows, w, top, disturb):
    """Of each text in float64: the mean over its positions of KL, with the expert's ``top`` classes and all others as one."""
    base, experts = toy_weights(TASKS)
    expert = {name: disturb(value.double()) for name, value in experts[task].items()}
    merged = {
        name: disturb(
            base[name].double()
            + sum(w[k, p].double() * (experts[own][name] - base[name]) for k, own in enumerate(TASKS))
        )
        for p, name in enumerate(toy_vectors())
    }
    values = []
    for row in rows:
        tokens, counts = torch.tensor(row["tokens"]), torch.tensor(row["counts"])
        p, q = (forward(weights, tokens)[1].softmax(-1) for weights in (expert, merged))
        kept = torch.zeros_like(p).scatter_(1, p.topk(min(top, p.shape[1])).indices, 1.0)
        rest = [(each * (1 - kept)).sum(1).clamp_min(1e-300) for each in (p, q)]
        values.append(((kept * p * (p / q).log()).sum(1) + rest[0] * (rest[0] / rest[1]).log())[counts].mean())
    return torch.stack(values)


def test_of_tokens_it_is_the_divergence_in_float64(monkeypatch):
    """Ten texts of different lengths, two batches and a half; of all classes, and of the expert's four likeliest."""
    for top in (128, 4):
        monkeypatch.setattr("adamerge.training.held_out.TOP", top)
        data, looking = HeldTexts(), Looking()
        module = descending(ToyLanguage(), toy_vectors(), partial(LayerWise, init=0.3), Entropy(), 0.1)
        toy_fit(module, data, 1, callbacks=[looking])
        for task in TASKS:
            rows = list(data.rows(task, "held_out"))
            wanted, bound = allowed(partial(divergences, task, rows, looking.w[1], top), ROUNDINGS)
            found = looking.looks[1].agreement[task].double()
            assert (found - wanted).abs().max() <= bound < 1e-4 * wanted.max()
            assert module.held_out.experts.agreement[task].abs().max() <= bound


def test_no_label_is_read_and_none_changes_a_bit():
    class Blind(ToyPoints):
        def load(self, task):
            return {split: rows.remove_columns("label") for split, rows in super().load(task).items()}

    found = []
    for kind, arguments in ((ToyPoints, {}), (ToyPoints, {"wrong_labels": True}), (Blind, {})):
        _, looking = fitted(kind(rows=100, held_out=0.1, **arguments))
        found.append([{task: own.tolist() for task, own in look.agreement.items()} for look in looking.looks.values()])
    assert found[0] == found[1] == found[2]


def test_looking_changes_no_bit_of_the_fit():
    data = partial(ToyPoints, rows=100, held_out=0.1)
    module, _ = fitted(data(), 5)
    plain = descending(ToyClassifier(), vectors_of(), partial(LayerWise, init=0.3), Entropy(), 0.1)
    fit_toy(plain, data(), 5)
    assert torch.equal(plain.merged.parametrization.w, module.merged.parametrization.w)


def test_the_experts_run_once_and_who_asks_twice_is_told_the_same(monkeypatch):
    passes = []
    plain = ToyClassifier.encode
    monkeypatch.setattr(
        ToyClassifier, "encode", lambda self, inputs, *rest: passes.append(len(inputs)) or plain(self, inputs)
    )
    module, _ = fitted(steps=2, hold=False)
    # two experts' 32 inputs in four batches of 8; three looks at both tasks; two steps of 16
    assert sum(passes) == 2 * 32 + 3 * 64 + 2 * 16 and passes[:8] == [8] * 8
    passes.clear()

    class Twice(Looking):
        def look(self, module):
            assert module.held_out.look(module) is module.held_out.look(module)

    fit_toy(module, ToyPoints(rows=100, held_out=0.1), 2, callbacks=[Twice()])
    assert sum(passes) == 2 * 32 + 3 * 64 + 2 * 16, "and a second fit begins anew"


def test_micro_batches_bound_the_passes(monkeypatch):
    passes = []
    plain = ToyClassifier.encode
    monkeypatch.setattr(
        ToyClassifier, "encode", lambda self, inputs, *rest: passes.append(len(inputs)) or plain(self, inputs)
    )
    fitted(steps=1, micro_batch=5)
    assert max(passes) == 5


def test_nothing_can_be_looked_at_where_nothing_is_held_out():
    with pytest.raises(ConfigError, match="no held-out inputs to look at"):
        fitted(ToyPoints(rows=100))


def test_what_has_fallen_and_how_surely():
    """Of eight samples six agreed before and two do now: two thirds are gone; -1 in four of eight, whose error is 0.189."""
    before, now = torch.tensor([1.0] * 6 + [0, 0]), torch.tensor([1.0] * 2 + [0] * 6)
    share, sure = fallen(SameClass(), now, before)
    assert share == pytest.approx(2 / 3) and sure == pytest.approx(
        0.5 / (torch.tensor([0.0] * 4 + [1] * 4).std() / 8**0.5).item()
    )
    worse, better = torch.full((4,), 1.5), torch.full((4,), 0.5)
    assert fallen(Divergence(), worse, better)[0] == pytest.approx(1 - 1 / math.e)
    assert fallen(Divergence(), better, worse)[0] < 0 and fallen(SameClass(), before, before) == (0.0, 0.0)
