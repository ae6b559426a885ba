"""Expert Merging as a composition: loss, gradient and steps against the paper's formulas in float64; planted answers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from modules import descending
from rounding import Disturb, allowed, undisturbed
from torch import Tensor
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from toys import WIDTH, ToyLanguage, ToyTexts, forward, toy_fit, toy_vectors, toy_weights

from adamerge.backbones import Batch, Teacher
from adamerge.backbones.inputs import stack
from adamerge.merging.merged_model import MergedModel
from adamerge.objectives import HiddenAlignment, LogitAlignment, Sum, SummedHiddenAlignment
from adamerge.objectives.penalties import DistanceToInitial
from adamerge.parametrizations import ChunkWise, LayerWise, TaskWise
from adamerge.parametrizations.constraints import Free, Sigmoid
from adamerge.training import MergingModule
from adamerge.training.objective_gradient import BatchObjective

TASKS, PRIOR, TEMPERATURE, HIDDEN, GAMMA = ("one", "two"), 0.1, 2.0, 0.7, 0.8
BETA = {"one": 1.5, "two": 0.5}
# a merge of two experts, a sum over a layer's inputs and a function of it, of the network and of its teacher; as many on the
# way back, and sums over up to eight positions of four samples
ROUNDINGS = 2 * 2 * (5 + WIDTH + 4) + 8 + 4


class Paper:
    """L = sum_k beta_k (T^2 KL + lambda_hid HID) + gamma / (K L) sum |alpha - abar|, alpha = sigmoid(w).

    HID is the mean square over layers 1 and 2, or the sum of squared norms over them.
    """

    def __init__(self, batch_size: int, summed: bool = False) -> None:
        self.summed = summed
        base, experts = toy_weights(TASKS)
        self.base = {name: value.double() for name, value in base.items()}
        self.experts = {task: {n: v.double() for n, v in expert.items()} for task, expert in experts.items()}
        self.names = list(toy_vectors(TASKS))  # the order of the columns of w
        self.data = ToyTexts(TASKS, batch_size=batch_size)
        self.data.serve(ToyLanguage())

    def samples(self, task: str, step: int) -> list[dict[str, Tensor]]:
        from adamerge.data.batch_order import Steps

        samples = self.data.samples(task, "calibration")
        return [
            samples[i]
            for i in Steps({task: samples}, None, batch_size=self.data.batch_size, seed=0, total=99).indices(task, step)
        ]

    def loss(self, w: Tensor, step: int, disturb: Disturb = undisturbed) -> Tensor:
        alpha = 1 / (1 + torch.exp(-w))
        merged = {
            name: disturb(self.base[name])
            + sum(alpha[k, p] * disturb(self.experts[task][name] - self.base[name]) for k, task in enumerate(TASKS))
            for p, name in enumerate(self.names)
        }
        experts = {t: {n: disturb(value) for n, value in expert.items()} for t, expert in self.experts.items()}
        total = GAMMA / (len(TASKS) * len(self.names)) * (alpha - PRIOR).abs().sum()
        for task in TASKS:
            losses = []
            for sample in self.samples(task, step):
                (ours, z), (theirs, zk) = (forward(m, sample["tokens"]) for m in (merged, experts[task]))
                counted = sample["counts"]
                log_p, log_q = (logits.div(TEMPERATURE).log_softmax(-1)[counted] for logits in (zk, z))
                kl = TEMPERATURE**2 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
                squares = [(ours[i] - theirs[i])[counted].square() for i in (1, 2)]
                hid = sum(each.mean() for each in squares) / 2
                if self.summed:
                    hid = sum(each.sum(-1).mean() for each in squares)
                losses.append(kl + HIDDEN * hid)
            total = total + BETA[task] * torch.stack(losses).mean()
        return total


PLAIN = partial(SGD, lr=1.0)


def module_of(optimizer=PLAIN, lr=0.5, schedule=None, micro_batch=None, summed=False) -> MergingModule:
    hidden = (
        SummedHiddenAlignment([0.5, -1]) if summed else HiddenAlignment([1, -1])
    )  # two blocks: the middle is state 1
    objective = Sum([LogitAlignment(TEMPERATURE), hidden], [1.0, HIDDEN])
    parametrization = partial(LayerWise, init=PRIOR, constraint=Sigmoid())
    return descending(
        ToyLanguage(), toy_vectors(TASKS), parametrization, objective, lr, optimizer, schedule,
        penalty=DistanceToInitial(GAMMA), task_weights=BETA, micro_batch=micro_batch,
    )  # fmt: skip


def start(paper: Paper) -> Tensor:
    return torch.full((2, len(paper.names)), PRIOR, dtype=torch.float64).logit()


def moved(module: MergingModule) -> MergingModule:
    """Off the prior, where the penalty has no slope."""
    w = module.merged.parametrization.w
    with torch.no_grad():
        w += 0.3 * torch.randn(w.shape, generator=torch.Generator().manual_seed(3))
    return module


@pytest.mark.parametrize(("micro_batch", "summed"), [(None, False), (3, False), (3, True)])
def test_loss_and_gradient_are_the_papers(micro_batch, summed):
    paper, module, gradients = Paper(4, summed), moved(module_of(micro_batch=micro_batch, summed=summed)), []
    w = module.merged.parametrization.w.detach().double().requires_grad_(True)
    module.merged.parametrization.w.register_hook(lambda gradient: gradients.append(gradient.clone()))
    toy_fit(module, ToyTexts(TASKS), 1)
    loss, slack = allowed(lambda disturb: paper.loss(w, 0, disturb).detach(), ROUNDINGS)
    assert float(module.trainer.logged_metrics["train/loss"]) == pytest.approx(float(loss), abs=slack)
    right, slack = allowed(lambda disturb: torch.autograd.grad(paper.loss(w, 0, disturb), w)[0], ROUNDINGS)
    assert (gradients[-1].double() - right).abs().max() <= slack < 1e-4
    assert right.abs().min() > 1e-4, "every coefficient is driven"


def test_three_sgd_steps_are_the_papers():
    paper, module = Paper(4), moved(module_of())
    start = module.merged.parametrization.w.detach().double()
    toy_fit(module, ToyTexts(TASKS), 3)

    def sgd(disturb: Disturb) -> Tensor:
        w = start
        for step in range(3):
            w = w.detach().requires_grad_(True)
            w = w - 0.5 * torch.autograd.grad(paper.loss(w, step, disturb), w)[0]
        return w.detach()

    expected, slack = allowed(sgd, ROUNDINGS)
    assert (module.merged.parametrization.w.double() - expected).abs().max() <= slack < 1e-4


def test_three_steps_of_the_papers_optimiser_are_the_papers():
    """AdamW at 0.5 in logit space, decay 1e-5, gradients clipped to norm 0.25, cosine with warm restarts to 0.05."""
    lr, decay, period, low = 0.5, 1e-5, 2, 0.05
    schedule = partial(CosineAnnealingWarmRestarts, T_0=period, T_mult=2, eta_min=low)
    paper, module = Paper(4), moved(module_of(partial(AdamW, weight_decay=decay), lr, schedule))
    parameter, gradients, values = module.merged.parametrization.w, [], []

    def seen(w: Tensor) -> None:
        values.append(w.detach().double())
        gradients.append(w.grad.double())

    parameter.register_post_accumulate_grad_hook(seen)
    toy_fit(module, ToyTexts(TASKS), 3, gradient_clip_val=0.25)
    values.append(parameter.detach().double())
    w = values[0].clone()
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    norms = []
    for step in range(3):
        # the gradient where this step stood: Adam divides by its size, so the rounding of a small one would grow
        here = values[step].clone().requires_grad_(True)
        right, slack = allowed(
            lambda disturb, here=here, step=step: torch.autograd.grad(paper.loss(here, step, disturb), here)[0],
            ROUNDINGS,
        )
        assert (gradients[step] - right).abs().max() <= slack < 1e-4
        norms.append(float(gradients[step].norm()))
        gradient = gradients[step] * min(1.0, 0.25 / (norms[-1] + 1e-6))
        now = step - period if step >= period else step
        rate = low + (lr - low) * (1 + torch.cos(torch.tensor(torch.pi * now / (period if step < period else 4)))) / 2
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        m, v = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        w = w * (1 - rate * decay) - rate * m / (v.sqrt() + 1e-8)
        assert (values[step + 1] - w).abs().max() < 1e-6
    assert max(norms) > 0.25 > min(norms), "the clip is at work"


# planted answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [LogitAlignment(), Sum([LogitAlignment(2.0), HiddenAlignment([0, 1, 2])])])
@pytest.mark.parametrize(
    "kind", [TaskWise, LayerWise, partial(ChunkWise, chunks=2)], ids=["task-wise", "layer-wise", "chunk-wise"]
)
def test_planted_coefficients_are_recovered(kind, objective):
    """A teacher that IS a merge: alignment with it finds its coefficients, of each task, tensor and chunk."""
    vectors, backbone = toy_vectors(TASKS), ToyLanguage()
    merged = MergedModel(backbone, vectors, kind(vectors, init=0.3, constraint=Free()))
    data = ToyTexts(TASKS, rows=40)
    data.serve(backbone)
    samples = data.samples("one", "calibration")
    inputs = stack([samples[i] for i in range(40)])
    generator = torch.Generator().manual_seed(1)
    w, start_w = merged.parametrization.w, merged.parametrization.w.detach().clone()
    planted = torch.rand(w.shape, generator=generator)
    with torch.no_grad():
        w.copy_(planted)
        merged.merge()
        encoded = merged(inputs, objective.hidden)
        w.copy_(start_w)
    batch = {"one": Batch(inputs, teacher=Teacher(encoded.features.clone(), hidden=encoded.hidden))}
    strategy = SingleDeviceStrategy()

    def loss() -> Tensor:
        """Of the coefficients as they are, with their gradient; LBFGS stops on absolute sizes, hence the factor."""
        w.grad = None
        with torch.enable_grad():
            merged.merge()
            losses = BatchObjective(merged, objective, {}, None, strategy).backward(batch).losses
            (1e4 * merged.pull_back(losses["one"])).backward()
        return 1e4 * losses["one"]

    def gradient(at: Tensor) -> Tensor:
        with torch.no_grad():
            w.copy_(at)
        loss()
        return w.grad.double().flatten()

    LBFGS([w], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe").step(loss)
    # near the minimum fp32 losses are blunt and gradients are not: Newton's steps, from differences of gradients
    found = w.detach().double()
    for _ in range(20):
        here, columns = gradient(found), []
        for i in range(found.numel()):
            step = torch.zeros(found.numel(), dtype=torch.float64)
            step[i] = 1e-2
            columns.append((gradient(found + step.view_as(found)) - gradient(found - step.view_as(found))) / 2e-2)
        curvature = torch.stack(columns)
        values, axes = torch.linalg.eigh((curvature + curvature.T) / 2)
        move = axes @ ((axes.T @ here) / (values.abs() + here.norm()))
        found = found - move.view_as(found)
        if move.abs().max() < 1e-4:
            break
    with torch.no_grad():
        w.copy_(found)
    assert (planted - start_w).abs().max() > 0.2
    assert (w.detach() - planted).abs().max() < 1e-3


def test_an_expert_that_alone_counts_is_recovered_by_a_fit():
    """All weight on one task: its expert's coefficient goes to 1 and the other's to 0, in the whole pipeline."""
    schedule = partial(CosineAnnealingWarmRestarts, T_0=100)
    module = descending(
        ToyLanguage(), toy_vectors(TASKS), partial(TaskWise, init=0.3), LogitAlignment(), 0.1,
        task_weights={"two": 0.0}, schedule=schedule,
    )  # fmt: skip
    toy_fit(module, ToyTexts(TASKS, batch_size=10), 100)
    assert (module.merged.parametrization.w.flatten() - torch.tensor([1.0, 0.0])).abs().max() < 1e-3
