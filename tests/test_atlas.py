"""aTLAS as a composition: loss, gradient and AdamW steps against the paper's formulas in float64; its three protocols."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from modules import descending
from rounding import Disturb, allowed, undisturbed
from torch import Tensor
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from toy_points import ROUNDINGS, TASKS, ToyClassifier, ToyPoints, fit_toy, logits_of, vectors_of, weights_of

from adamerge.data.batch_order import Steps
from adamerge.objectives import CrossEntropy
from adamerge.objectives.penalties import CoefficientNorm, Penalty
from adamerge.parametrizations import LayerWise
from adamerge.training import MergingModule

LR, DECAY, CLIP = 0.05, 0.1, 1.0


class Paper:
    """L = sum_t beta_t mean CE + gamma mean_p ||lambda_{:,p}||_q, theta_p = theta0_p + sum_k lambda_{k,p} tau_{k,p}."""

    def __init__(self, beta: dict[str, float], gamma: float = 0.0, order: float = 1.0) -> None:
        base, experts = weights_of()
        self.base = {name: value.double() for name, value in base.items()}
        self.taus = {t: {n: v.double() - self.base[n] for n, v in expert.items()} for t, expert in experts.items()}
        self.names = list(vectors_of())
        self.beta, self.gamma, self.order = beta, gamma, order
        self.data = ToyPoints(labelled=True)
        self.data.serve(ToyClassifier())
        samples = {task: self.data.samples(task, "calibration") for task in TASKS}
        labels = {task: self.data.labels(task, "calibration") for task in TASKS}
        self.steps = Steps(samples, labels, batch_size=self.data.batch_size, seed=0, total=99)

    def loss(self, w: Tensor, step: int, disturb: Disturb = undisturbed) -> Tensor:
        merged = {
            name: disturb(self.base[name])
            + sum(w[k, p] * disturb(self.taus[task][name]) for k, task in enumerate(TASKS))
            for p, name in enumerate(self.names)
        }
        total = torch.zeros((), dtype=torch.float64)
        for task, batch in self.steps[step].items():
            z = logits_of(merged, task, batch.inputs.double())
            log_p = z - z.exp().sum(1, keepdim=True).log()
            total = total - self.beta[task] * log_p[torch.arange(len(z)), batch.labels].mean()
        norms = (w.abs() ** self.order).sum(0) ** (1 / self.order) if self.gamma else torch.zeros(1)
        return total + self.gamma * norms.mean()


def sgd(parameters):
    return SGD(parameters, 1.0)


def module_of(beta: dict[str, float], penalty: Penalty | None = None, optimizer=sgd, **arguments) -> MergingModule:
    return descending(
        ToyClassifier(), vectors_of(), partial(LayerWise, init=0.0), CrossEntropy(), LR, optimizer, penalty, beta, **arguments
    )  # fmt: skip


def moved(module: MergingModule) -> Tensor:
    """Off 0, where the penalty has no slope; the start in float64."""
    w = module.merged.parametrization.w
    with torch.no_grad():
        w += 0.3 * torch.randn(w.shape, generator=torch.Generator().manual_seed(3))
    return w.detach().double()


PROTOCOLS = {
    "addition": ({"one": 1.0, "two": 1.0}, 0.0, 1.0),
    "addition with L1": ({"one": 1.0, "two": 1.0}, 0.5, 1.0),
    "addition with L2": ({"one": 1.0, "two": 1.0}, 0.5, 2.0),
    "negation": ({"one": -1.0, "two": 1.0}, 0.0, 1.0),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_loss_and_gradient_are_the_papers(protocol):
    beta, gamma, order = PROTOCOLS[protocol]
    paper, gradients = Paper(beta, gamma, order), []
    module = module_of(beta, CoefficientNorm(gamma, order) if gamma else None)
    w = moved(module).requires_grad_(True)
    module.merged.parametrization.w.register_hook(lambda gradient: gradients.append(gradient.clone()))
    fit_toy(module, ToyPoints(labelled=True), 1)
    loss, slack = allowed(lambda disturb: paper.loss(w, 0, disturb).detach(), ROUNDINGS)
    assert float(module.trainer.logged_metrics["train/loss"]) == pytest.approx(float(loss), abs=slack)
    right, slack = allowed(lambda disturb: torch.autograd.grad(paper.loss(w, 0, disturb), w)[0], ROUNDINGS)
    assert (gradients[-1].double() - right).abs().max() <= slack < 1e-4
    assert right.abs().min() > 1e-4, "every coefficient is driven"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_three_steps_of_the_papers_optimiser(protocol):
    """AdamW with decay 0.1, towards the base, on gradients clipped to a norm between the smallest and the largest of them."""
    beta, gamma, order = PROTOCOLS[protocol]
    penalty = CoefficientNorm(gamma, order) if gamma else None
    paper, module = Paper(beta, gamma, order), module_of(beta, penalty, partial(AdamW, weight_decay=DECAY))
    w, norms = moved(module), []
    unclipped = adamw(paper, w, [LR] * 3, norms, undisturbed, math.inf)
    clip = (min(norms) + max(norms)) / 2
    fit_toy(module, ToyPoints(labelled=True), 3, gradient_clip_val=clip)
    expected, slack = allowed(lambda disturb: adamw(paper, w, [LR] * 3, [], disturb, clip), ROUNDINGS)
    assert (module.merged.parametrization.w.double() - expected).abs().max() <= slack < 1e-4
    assert (unclipped - expected).abs().max() > 2 * slack, "the clip is at work"


def test_three_steps_of_the_few_shot_schedule():
    """A large rate on a cosine to 0."""
    schedule = partial(CosineAnnealingLR, T_max=3)
    beta = dict.fromkeys(TASKS, 1.0)
    paper, module = Paper(beta), module_of(beta, None, partial(AdamW, weight_decay=DECAY), schedule=schedule)
    w = moved(module)
    rates = [LR * (1 + float(torch.cos(torch.tensor(torch.pi * step / 3)))) / 2 for step in range(3)]
    fit_toy(module, ToyPoints(labelled=True), 3, gradient_clip_val=CLIP)
    expected, slack = allowed(lambda disturb: adamw(paper, w, rates, [], disturb), ROUNDINGS)
    assert (module.merged.parametrization.w.double() - expected).abs().max() <= slack < 1e-4


def adamw(
    paper: Paper, start: Tensor, rates: list[float], norms: list[float], disturb: Disturb, clip: float = CLIP
) -> Tensor:
    """Where steps of these rates lead; the norms of the gradients go into ``norms``."""
    w, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step, rate in enumerate(rates):
        at = w.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(paper.loss(at, step, disturb), at)
        norms.append(float(gradient.norm()))
        gradient = gradient * min(1.0, clip / (norms[-1] + 1e-6))
        first.mul_(0.9).add_(0.1 * gradient)
        second.mul_(0.999).add_(0.001 * gradient**2)
        m, v = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        w.copy_(w * (1 - rate * DECAY) - rate * m / (v.sqrt() + 1e-8))
    return w


def test_weight_decay_alone_pulls_to_the_base():
    """lambda shrinks by 1 - lr wd a step when no task drives it."""
    module = module_of({"one": 0.0, "two": 0.0}, None, partial(AdamW, weight_decay=DECAY))
    w = moved(module)
    fit_toy(module, ToyPoints(labelled=True), 3)
    assert (module.merged.parametrization.w.double() - w * (1 - LR * DECAY) ** 3).abs().max() < 1e-7
