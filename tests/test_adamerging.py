"""AdaMerging as a composition: loss, gradient and Adam's steps against the paper's formulas in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from modules import descending
from rounding import Disturb, allowed, undisturbed
from torch import Tensor
from torch.optim import SGD, Adam
from toy_points import ROUNDINGS, TASKS, ToyClassifier, ToyPoints, fit_toy, logits_of, weights_of

from adamerge.data.batch_order import Steps
from adamerge.objectives import Entropy
from adamerge.parametrizations import LayerWise, TaskWise
from adamerge.parametrizations.constraints import Clamp, Constraint, Projection
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training import MergingModule
from adamerge.transforms import Ties

LR, KEEP = 0.05, 0.4


class Paper:
    """L = sum_t mean H(softmax f(x; theta)), theta_p = theta0_p + sum_k lambda_{k,p} Phi(tau_k)_p."""

    def __init__(self, plusplus: bool, constraint: Constraint) -> None:
        base, experts = weights_of()
        self.base = {name: value.double() for name, value in base.items()}
        self.taus = {t: {n: v.double() - self.base[n] for n, v in expert.items()} for t, expert in experts.items()}
        if plusplus:
            self.taus = ties(self.taus)
        self.names = list(TaskVectors(base, experts))  # the order of the columns of w
        self.clamped = isinstance(constraint, Clamp)
        self.data = ToyPoints()
        self.data.serve(ToyClassifier())
        samples = {task: self.data.samples(task, "calibration") for task in TASKS}
        self.steps = Steps(samples, None, batch_size=self.data.batch_size, seed=0, total=99)

    def loss(self, w: Tensor, step: int, disturb: Disturb = undisturbed) -> Tensor:
        coefficients = (w.clamp(0, 1) if self.clamped else w).expand(-1, len(self.names))
        merged = {
            name: disturb(self.base[name])
            + sum(coefficients[k, p] * disturb(self.taus[task][name]) for k, task in enumerate(TASKS))
            for p, name in enumerate(self.names)
        }
        total = torch.zeros((), dtype=torch.float64)
        for task, batch in self.steps[step].items():
            p = logits_of(merged, task, batch.inputs.double()).softmax(1)
            total = total - (p * p.log()).sum(1).mean()
        return total


def ties(taus: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """The largest weights of each expert in all its tensors, those of the elected sign; not averaged: lambda sums them."""
    flat = torch.stack([torch.cat([value.flatten() for value in tau.values()]) for tau in taus.values()])
    edge = flat.abs().kthvalue(flat.shape[1] - int(KEEP * flat.shape[1]), dim=1, keepdim=True).values
    trimmed = flat * (flat.abs() >= edge)
    kept = trimmed * (trimmed.sign() == trimmed.sum(0).sign())
    sizes = [value.numel() for value in next(iter(taus.values())).values()]
    return {
        task: {name: part.view_as(tau[name]) for name, part in zip(tau, row.split(sizes), strict=True)}
        for (task, tau), row in zip(taus.items(), kept, strict=True)
    }


def sgd(parameters):
    return SGD(parameters, 1.0)


def module_of(kind, plusplus: bool, constraint: Constraint, optimizer) -> tuple[MergingModule, Tensor]:
    """The engine's, off its start; and that start in float64."""
    vectors = TaskVectors(*weights_of(), transforms=[Ties(KEEP)] if plusplus else [])
    parametrization = partial(kind, init=0.3, constraint=constraint)
    module = descending(ToyClassifier(), vectors, parametrization, Entropy(), LR, optimizer)
    w = module.merged.parametrization.w
    with torch.no_grad():
        w += 0.1 * torch.randn(w.shape, generator=torch.Generator().manual_seed(3))
    return module, w.detach().double()


KINDS = pytest.mark.parametrize("kind", [TaskWise, LayerWise], ids=["task-wise", "layer-wise"])
PLUSPLUS = pytest.mark.parametrize("plusplus", [False, True], ids=["AdaMerging", "AdaMerging++"])
CONSTRAINTS = pytest.mark.parametrize("constraint", [Projection(), Clamp()], ids=["projection", "clamp"])


@KINDS
@PLUSPLUS
@CONSTRAINTS
def test_loss_and_gradient_are_the_papers(kind, plusplus, constraint):
    paper, gradients = Paper(plusplus, constraint), []
    module, w = module_of(kind, plusplus, constraint, sgd)
    module.merged.parametrization.w.register_post_accumulate_grad_hook(lambda w: gradients.append(w.grad.double()))
    fit_toy(module, ToyPoints(), 1)
    loss, slack = allowed(lambda disturb: paper.loss(w, 0, disturb), ROUNDINGS)
    assert float(module.trainer.logged_metrics["train/loss"]) == pytest.approx(float(loss), abs=slack)
    w.requires_grad_(True)
    right, slack = allowed(lambda disturb: torch.autograd.grad(paper.loss(w, 0, disturb), w)[0], ROUNDINGS)
    assert (gradients[0] - right).abs().max() <= slack < 1e-4
    assert right.abs().min() > 1e-4, "every coefficient is driven"


@KINDS
@PLUSPLUS
@CONSTRAINTS
def test_three_steps_of_adam_are_the_papers(kind, plusplus, constraint):
    paper, (module, w) = Paper(plusplus, constraint), module_of(kind, plusplus, constraint, Adam)
    fit_toy(module, ToyPoints(), 3)

    def adam(disturb: Disturb) -> Tensor:
        at, first, second = w, torch.zeros_like(w), torch.zeros_like(w)
        for step in range(3):
            here = at.clone().requires_grad_(True)
            (gradient,) = torch.autograd.grad(paper.loss(here, step, disturb), here)
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            m, v = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            at = at - LR * m / (v.sqrt() + 1e-8)
            at = at.clamp(0, 1) if isinstance(constraint, Projection) else at
        return at

    expected, slack = allowed(adam, ROUNDINGS)
    assert (module.merged.parametrization.w.double() - expected).abs().max() <= slack < 1e-4


def test_projection_and_clamp_are_two_methods():
    """Where a step leaves the interval, they part: the sweep above has both at work."""
    found = []
    for constraint in (Projection(), Clamp()):
        module, _ = module_of(LayerWise, False, constraint, partial(Adam, betas=(0.5, 0.9)))
        with torch.no_grad():
            module.merged.parametrization.w.fill_(0.01)
        found.append(fit_toy(module, ToyPoints(), 3).merged.parametrization.w.detach())
    assert (found[0] - found[1]).abs().max() > 1e-2
