"""Marginal entropy: by hand, its exact gradient whatever the micro-batches and processes, collapse is worst; no labels."""

import math
from pathlib import Path

import pytest
import torch
from modules import descending
from rounding import gamma
from running import child
from toy_points import INPUTS, ROUNDINGS, TASKS, ToyClassifier, ToyPoints, fit_toy, logits_of, vectors_of, weights_of

from adamerge.backbones import Batch, Encoded, Output
from adamerge.errors import ConfigError, DataError
from adamerge.merging.merged_model import MergedModel
from adamerge.objectives import Entropy, MarginalEntropy, PseudoLabel, Sum, Unchanged
from adamerge.parametrizations import LayerWise
from adamerge.training.objective_gradient import BatchObjective


class Alone:
    """A strategy of one process."""

    world_size = 1

    def reduce(self, totals, reduce_op):
        return totals


def output_of(p, mask=None):
    logits = torch.tensor(p).log().clamp_min(-200)
    return Output(logits, Encoded(torch.zeros(len(logits), 1), mask=mask))


def losses_of(p, mask=None, **arguments):
    """Losses of samples with these predictions."""
    objective, output = MarginalEntropy(**arguments), output_of(p, mask)
    batch = objective.prepare("task", Batch(torch.zeros(len(p), 1)), lambda inputs: output)
    return objective(output, batch)


def test_three_numbers_by_hand():
    # q = (1/2, 1/2): each sample's sum is log(1/2), however sure it is
    assert losses_of([[1.0, 0.0], [0.0, 1.0]]).tolist() == pytest.approx([-math.log(2)] * 2, abs=1e-6)
    # q = (3/4, 1/4): -H = 3/4 log(3/4) + 1/4 log(1/4) = -0.5623351446
    uneven = losses_of([[1.0, 0.0], [0.5, 0.5]])
    assert uneven.tolist() == pytest.approx([math.log(0.75), 0.5 * math.log(0.75) + 0.5 * math.log(0.25)], abs=1e-6)
    assert uneven.mean().item() == pytest.approx(-0.5623351446, abs=1e-6)
    assert losses_of([[0.0, 1.0], [0.0, 1.0]]).tolist() == [0.0, 0.0]
    # in bits, which is what division by log 2 gives
    assert losses_of([[1.0, 0.0], [0.5, 0.5]], normalise=True).mean().item() == pytest.approx(-0.8112781245, abs=1e-6)


def test_a_collapsed_prediction_is_worst_and_an_even_mean_is_best():
    torch.manual_seed(0)
    collapsed, even = torch.eye(5)[[2] * 5].tolist(), torch.eye(5).tolist()
    worst, best = losses_of(collapsed).mean(), losses_of(even).mean()
    assert worst == 0 and best.item() == pytest.approx(-math.log(5), rel=1e-6)
    for _ in range(20):
        mean = losses_of(torch.randn(5, 5).softmax(dim=-1).tolist()).mean()
        assert best < mean < worst
    # each of the collapsed predictions is sure, which entropy alone takes for best; the sum of both tells
    assert Entropy()(output_of(collapsed), Batch(torch.zeros(5, 1))).abs().max() == 0


def test_positions_that_do_not_count_are_left_out():
    mask = torch.tensor([[True, False], [True, True]])
    p = [[[1.0, 0.0], [0.5, 0.5]], [[0.5, 0.5], [0.0, 1.0]]]
    # means of the samples: (1, 0) and (1/4, 3/4); q = (5/8, 3/8)
    expected = [math.log(5 / 8), 0.25 * math.log(5 / 8) + 0.75 * math.log(3 / 8)]
    assert losses_of(p, mask).tolist() == pytest.approx(expected, abs=1e-6)


def merged():
    vectors = vectors_of()
    model = MergedModel(ToyClassifier(), vectors, LayerWise(vectors, init=0.3))
    model.backbone.build_heads(dict.fromkeys(TASKS), {})
    return model


def points():
    generator = torch.Generator().manual_seed(3)
    return {task: torch.randn(n, INPUTS, generator=generator) for task, n in zip(TASKS, (5, 7), strict=True)}


def gradient_of(objective, micro_batch):
    model = merged()
    model.merge()
    batch = {task: Batch(inputs) for task, inputs in points().items()}
    losses = BatchObjective(model, objective, {}, micro_batch, Alone()).backward(batch).losses
    model.pull_back(torch.stack(list(losses.values())).sum()).backward()
    return losses, model.parametrization.w.grad


def by_the_formula(entropies=0.0):
    """``sum_c q_c log q_c`` of each task, and the coefficients' gradient, by autograd in float64."""
    base, experts = weights_of()
    names = sorted(base)
    w = torch.full((len(TASKS), len(names)), 0.3, dtype=torch.float64, requires_grad=True)
    theta = {
        name: base[name].double()
        + sum(w[k, n] * (experts[task][name] - base[name]).double() for k, task in enumerate(TASKS))
        for n, name in enumerate(names)
    }
    losses = {}
    for task, inputs in points().items():
        p = logits_of(theta, task, inputs.double()).softmax(dim=-1)
        q = p.mean(dim=0)
        losses[task] = (q * q.log()).sum() - entropies * (p * p.log()).sum(dim=-1).mean()
    return losses, dict(zip(names, torch.autograd.grad(sum(losses.values()), w)[0].T, strict=True))


@pytest.mark.parametrize("micro_batch", [1, 3, None])
@pytest.mark.parametrize("entropies", [0.0, 1.0], ids=["alone", "information maximisation"])
def test_the_gradient_is_that_of_the_entropy_of_the_mean_whatever_the_micro_batch(micro_batch, entropies):
    """SHOT's formula: the mean over ALL samples goes through autograd here, in one piece."""
    objective = Sum([Entropy(), MarginalEntropy()], [1.0, 1.0]) if entropies else MarginalEntropy()
    losses, found = gradient_of(objective, micro_batch)
    expected_losses, expected = by_the_formula(entropies)
    for task, loss in losses.items():
        assert float(loss) == pytest.approx(float(expected_losses[task].detach()), abs=2 * gamma(ROUNDINGS))
    order = list(merged().parametrization.values())
    wanted = torch.stack([expected[name] for name in order], dim=1)
    assert wanted.abs().max() > 1e-2
    # a sum over the weights of a tensor, after the network there and back
    assert (found - wanted).abs().max() <= 4 * gamma(ROUNDINGS + 25) * wanted.abs().max()


PROCESSES = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from lightning import Trainer
from torch.optim import SGD
from functools import partial
from toy_points import QUIET, ToyClassifier, ToyPoints, vectors_of
from adamerge.objectives import MarginalEntropy
from adamerge.parametrizations import LayerWise
from modules import descending

torch.set_num_threads(1)
module = descending(
    ToyClassifier(), vectors_of(), LayerWise, MarginalEntropy(), 0.5, partial(SGD, lr=1.0), micro_batch=3
)
parallel = {"devices": 2, "strategy": "ddp"} if sys.argv[3] == "2" else {"devices": 1}
trainer = Trainer(**QUIET, max_steps=3, max_epochs=1, **parallel)
trainer.fit(module, ToyPoints(batch_size=7))
torch.save(module.merged.parametrization.w.detach(), f"{sys.argv[2]}_{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_take_the_mean_over_both(tmp_path):
    """Four and three of seven samples: the mean of each process's own would be another one."""
    (tmp_path / "fit.py").write_text(PROCESSES)
    for name, devices in (("alone", 1), ("both", 2)):
        done = child([tmp_path / "fit.py", Path(__file__).parents[1], name, devices], tmp_path, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, first, second = (torch.load(tmp_path / f"{n}.pt") for n in ("alone_0", "both_0", "both_1"))
    assert torch.equal(first, second), "the ranks drifted apart"
    moved = (alone - 0.3).abs().max()
    # three gradients of at most what was moved; in both runs each is off by a sum over samples and weights, there and back
    assert (alone - first).abs().max() <= 2 * 3 * gamma(ROUNDINGS + 25 + 7) * moved and moved > 1e-3


def test_a_fit_spreads_the_predictions():
    def fitted(objective):
        module = descending(ToyClassifier(), vectors_of(), LayerWise, objective, 0.05)
        return fit_toy(module, ToyPoints(batch_size=20), 30)

    spread = {name: fitted(objective) for name, objective in (("entropy", Entropy()), ("even", MarginalEntropy()))}
    least = {
        name: min(float(task.marginal_entropy()) for task in m.evaluation.spread.values()) for name, m in spread.items()
    }
    assert least["even"] > least["entropy"]


def test_it_needs_to_be_prepared():
    with pytest.raises(DataError, match="no mean prediction"):
        MarginalEntropy()(output_of([[0.5, 0.5]]), Batch(torch.zeros(1, 1)))


def test_who_changes_the_inputs_comes_before_it():
    parts = [PseudoLabel(strong=Unchanged()), MarginalEntropy()]
    module = descending(ToyClassifier(), vectors_of(), LayerWise, Sum(parts), 0.05)
    assert fit_toy(module, ToyPoints(batch_size=8), 2).global_step == 2

    class Doubled(Entropy):
        def prepare(self, task, batch, predict):
            return batch._replace(inputs=2 * batch.inputs)

    output = output_of([[0.5, 0.5]])
    batch = Batch(torch.zeros(1, 1))
    assert Sum([Doubled(), MarginalEntropy()]).prepare("task", batch, lambda _: output).marginal is not None
    with pytest.raises(ConfigError, match="Doubled changes the inputs after their mean prediction was taken"):
        Sum([MarginalEntropy(), Doubled()]).prepare("task", batch, lambda _: output)


def test_it_has_no_parameters_and_asks_for_no_labels():
    assert not list(MarginalEntropy().parameters())
    assert not MarginalEntropy().labelled and not MarginalEntropy().taught
