"""Adaptive merging: micro-batches change nothing, weights and penalties enter as written, the guard undoes bad steps."""

import copy

import pytest
import torch
from conftest import CLASSES
from lightning import Trainer
from modules import descending
from rounding import gamma, roundings_of
from torch.optim import SGD, Adam

from adamerge import Descent, ImageCalibration, ImageTask, TaskVectors
from adamerge.backbones import OpenClipClassifier
from adamerge.errors import ConfigError, DivergedError
from adamerge.objectives import Entropy
from adamerge.objectives.penalties import DistanceToInitial
from adamerge.parametrizations import LayerWise, TaskWise
from adamerge.parametrizations.constraints import Clamp, Free, Projection, Sigmoid
from adamerge.training import MergingModule

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
}


def images(folders, **arguments) -> ImageCalibration:
    tasks = {task: ImageTask(folder, ["a photo of {}"]) for task, folder in folders.items()}
    return ImageCalibration(tasks=tasks, **{"batch_size": 5, **arguments})


def sgd(parameters):
    return SGD(parameters, 1.0)


def module_of(pool, parametrization=LayerWise, objective=None, optimizer=sgd, lr=0.5, **arguments) -> MergingModule:
    vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"])
    objective = objective if objective is not None else Entropy()
    # nothing is held where passes are counted
    arguments = {"hold": False, **arguments}
    return descending(OpenClipClassifier(pool["base"]), vectors, parametrization, objective, lr, optimizer, **arguments)


def fitted(module, data, steps=3, **arguments) -> MergingModule:
    trainer = Trainer(max_steps=steps, max_epochs=1, **{**QUIET, "limit_val_batches": 0, **arguments})
    trainer.fit(module, data)
    return module


def w(module) -> torch.Tensor:
    return module.merged.parametrization.w.detach()


@pytest.mark.parametrize("micro_batch", [None, 1, 3])
def test_a_step_merges_and_contracts_once_however_many_micro_batches_it_has(
    pool, image_folders, micro_batch, monkeypatch
):
    module, calls = module_of(pool, micro_batch=micro_batch), []
    for name in ("merge", "pull_back", "_contract"):
        plain = getattr(module.merged, name)
        monkeypatch.setattr(module.merged, name, lambda *a, _p=plain, _n=name, **k: calls.append(_n) or _p(*a, **k))
    fitted(module, images(image_folders), steps=2)
    assert calls == ["merge", "pull_back", "_contract"] * 2


def gradient_of(pool, folders, **arguments) -> torch.Tensor:
    """``dL/dw`` of the first step."""
    module, found = module_of(pool, **arguments), []
    module.merged.parametrization.w.register_hook(lambda gradient: found.append(gradient.clone()))
    fitted(module, images(folders), steps=1)
    return found[0]


@pytest.fixture(scope="module")
def rounding(pool):
    """Of a gradient's largest entry: five positions and five samples of two tasks go through the network, there and back."""
    return gamma(roundings_of(OpenClipClassifier(pool["base"]).network.visual, positions=5, samples=10))


@pytest.fixture
def plain(pool, image_folders):
    return gradient_of(pool, image_folders)


@pytest.mark.parametrize("micro_batch", [1, 3, 7])
def test_micro_batches_change_nothing(micro_batch, pool, image_folders, plain, rounding):
    """Ten samples a step, of two tasks: 3 and 7 cut across the border between the tasks, and take other matrix kernels."""
    found = gradient_of(pool, image_folders, micro_batch=micro_batch)
    assert (found - plain).abs().max() <= 2 * rounding * plain.abs().max()


def test_three_sgd_steps_with_micro_batches(pool, image_folders, plain, rounding):
    whole, parts = (w(fitted(module_of(pool, micro_batch=size), images(image_folders))) for size in (None, 3))
    assert (whole - parts).abs().max() <= 3 * 0.5 * 2 * rounding * plain.abs().max()
    assert (whole - 0.3).abs().max() > 100 * (whole - parts).abs().max(), "something was learned"


def test_the_gradient_is_that_of_the_formula_in_float64(pool, image_folders, plain):
    """sum over tasks of the mean entropy, by finite differences of w with everything in double precision."""
    data = images(image_folders)
    module = module_of(pool)
    backbone = module.merged.backbone
    data.serve(backbone)
    backbone.build_heads(data.tasks, {})
    from adamerge.data.batch_order import Steps

    batch = Steps(
        {task: data.samples(task, "calibration") for task in data.tasks}, None, batch_size=5, seed=0, total=1
    )[0]
    network = copy.deepcopy(backbone.network).double()
    vectors = module.merged.task_vectors
    base = {name: value.double() for name, value in vectors.base.items()}
    deltas = {name: vectors[name].dense().double() for name in vectors}

    def loss(values: torch.Tensor) -> float:
        state = {
            name: base[name] + torch.einsum("k,k...->...", values[:, column], deltas[name])
            for column, name in enumerate(vectors)
        }
        network.load_state_dict({**base, **state})
        total = 0.0
        for task, part in batch.items():
            inputs = part.inputs
            pixels = (inputs.double() / 255 - backbone._mean) / backbone._std
            features = torch.nn.functional.normalize(network.encode_image(pixels), dim=-1)
            p = (features @ backbone.heads[task].weight.double().T).softmax(-1)
            total += float(-(p * p.log()).sum(-1).mean())
        return total

    start = torch.full_like(plain, 0.3, dtype=torch.float64)
    with torch.no_grad():
        for expert, column in ((0, 0), (1, 3), (0, plain.shape[1] - 1), (1, plain.shape[1] // 2)):
            step = torch.zeros_like(start)
            step[expert, column] = 1e-4
            expected = (loss(start + step) - loss(start - step)) / 2e-4
            assert plain[expert, column].item() == pytest.approx(
                expected, rel=2e-3, abs=2e-3 * plain.abs().max().item()
            )


def test_task_weights(pool, image_folders, plain, rounding):
    colours = gradient_of(pool, image_folders, task_weights={"shapes": 0.0})
    shapes = gradient_of(pool, image_folders, task_weights={"colours": 0.0})
    mixed = gradient_of(pool, image_folders, task_weights={"colours": 2.0, "shapes": 0.5})
    scale = colours.abs().max() + shapes.abs().max()
    assert (colours + shapes - plain).abs().max() <= 2 * rounding * scale
    assert (2 * colours + 0.5 * shapes - mixed).abs().max() <= 2 * 2 * rounding * scale
    assert (colours - shapes).abs().max() > 1e-3 * scale


def test_penalty(pool, image_folders, plain):
    """mean |c - c0|^2 has gradient 2 (c - c0) / n: none at the start, a pull afterwards."""
    pulled = module_of(pool, lr=1.0, penalty=DistanceToInitial(weight=5.0, power=2.0))
    free = module_of(pool, lr=1.0)
    data = images(image_folders)
    for module in (pulled, free):
        fitted(module, data, steps=1)
    assert torch.equal(w(pulled), w(free))
    size = w(free).numel()
    second_pulled = w(fitted(module_of(pool, lr=1.0, penalty=DistanceToInitial(5.0, 2.0)), data, steps=2))
    second_free = w(fitted(module_of(pool, lr=1.0), data, steps=2))
    expected = 5.0 * 2 * (w(free) - 0.3) / size
    assert torch.allclose(second_free - second_pulled, expected, atol=1e-6)


def test_projection_keeps_coefficients_inside_after_every_step(pool, image_folders):
    bounds = []

    class Watched(Projection):
        def __call__(self, values):
            bounds.append((float(values.detach().min()), float(values.detach().max())))
            return values

    def parametrization(vectors):
        return LayerWise(vectors, 0.3, Watched())

    module = fitted(module_of(pool, parametrization, lr=300.0), images(image_folders), steps=4)
    assert bounds and all(low >= 0 and high <= 1 for low, high in bounds)
    assert w(module).min() >= 0 and w(module).max() <= 1
    assert ((w(module) == 0) | (w(module) == 1)).any(), "the bounds were reached"


def test_a_clamped_coefficient_is_dead_and_a_projected_one_is_not(pool, image_folders):
    def started(constraint):
        def parametrization(vectors):
            made = TaskWise(vectors, 0.3, constraint)
            made.w.data[0, 0] = -0.2  # outside, as after a step too far
            return made

        return parametrization

    dead = fitted(module_of(pool, started(Clamp())), images(image_folders), steps=3)
    assert w(dead)[0, 0] == pytest.approx(-0.2), "the paper's clamp: no gradient outside"
    assert w(dead)[1, 0] != 0.3
    alive = module_of(pool, started(Projection()), lr=1e-3)
    alive.merged.parametrization.project_()
    assert w(alive)[0, 0] == 0
    gradients = []
    alive.merged.parametrization.w.register_hook(lambda gradient: gradients.append(gradient.clone()))
    fitted(alive, images(image_folders), steps=2)
    assert all(gradient[0, 0] != 0 for gradient in gradients), "at the bound the gradient lives on"


def test_sigmoid_descends_in_w(pool, image_folders):
    def parametrization(vectors):
        return TaskWise(vectors, 0.3, Sigmoid())

    linear = module_of(pool, TaskWise, lr=1.0)
    squashed = module_of(pool, parametrization, lr=1.0)
    starts = [w(linear).clone(), w(squashed).clone()]
    steps = [
        start - w(fitted(module, images(image_folders), 1))
        for start, module in zip(starts, (linear, squashed), strict=True)
    ]
    assert torch.allclose(steps[1], steps[0] * 0.3 * 0.7, rtol=1e-3, atol=1e-7), "chain rule: phi' = c (1 - c)"


class PoisonedAt(Entropy):
    """Infinite from one step on."""

    def __init__(self, step: int, value: float) -> None:
        super().__init__()
        self.step, self.value, self.calls = step, value, 0

    def forward(self, output, batch):
        self.calls += 1
        bad = (self.calls - 1) // 2 == self.step
        return super().forward(output, batch) * (self.value if bad else 1.0)


@pytest.mark.parametrize(
    "optimizer", [sgd, lambda p: SGD(p, 1.0, momentum=0.9), lambda p: Adam(p, 1.0, weight_decay=0.1)]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_guard_undoes_the_step_that_is_not_finite(optimizer, value, pool, image_folders):
    good = fitted(module_of(pool, optimizer=optimizer, lr=0.01), images(image_folders), steps=2)
    bad = module_of(pool, objective=PoisonedAt(2, value), optimizer=optimizer, lr=0.01)
    with pytest.raises(DivergedError, match="step 3"):
        fitted(bad, images(image_folders), steps=6)
    assert torch.equal(w(bad), w(good))
    state = bad.optimizers(use_pl_optimizer=False).state
    assert all(torch.isfinite(value).all() for entry in state.values() for value in entry.values() if value is not None)


def test_a_gradient_that_is_not_finite_though_the_loss_is(pool, image_folders):
    class Cusp(Entropy):
        calls = 0

        def forward(self, output, batch):
            Cusp.calls += 1
            plain = super().forward(output, batch)
            # sqrt(0) is finite, its slope is not
            return plain + (plain - plain.detach()).abs().sqrt() if Cusp.calls > 4 else plain

    module = module_of(pool, objective=Cusp(), lr=0.01)
    good = fitted(module_of(pool, lr=0.01), images(image_folders), steps=2)
    with pytest.raises(DivergedError, match="step 3: the gradient"):
        fitted(module, images(image_folders), steps=6)
    assert torch.equal(w(module), w(good))


def test_coefficients_stay_fp32_under_bf16_mixed_and_match_fp32_roughly(pool, image_folders, plain):
    module = module_of(pool, lr=1.0)
    before = w(module).clone()
    fitted(module, images(image_folders), steps=1, precision="bf16-mixed")
    assert w(module).dtype == torch.float32
    found = before - w(module)
    assert torch.cosine_similarity(found.flatten(), plain.flatten(), dim=0) > 0.95


def test_learning_rate_is_the_modules(pool):
    module = module_of(pool, optimizer=Adam, lr=0.123)
    assert [group["lr"] for group in module.search.optimizers(1)[0][0].param_groups] == [0.123]


@pytest.mark.parametrize("arguments", [{"lr": 0.0}, {"lr": -1.0}, {"lr": float("nan")}, {"micro_batch": 0}])
def test_numbers_out_of_range(arguments, pool):
    with pytest.raises(ConfigError):
        module_of(pool, **arguments)


def test_only_coefficients_are_registered(pool):
    module = module_of(pool)
    assert [name for name, _ in module.named_parameters()] == ["merged.parametrization.w"]
    assert not dict(module.named_buffers()) and module.state_dict().keys() == {"merged.parametrization.w"}


def test_everything_that_the_figures_need_is_logged(pool, image_folders):
    module = module_of(pool, penalty=DistanceToInitial(), parametrization=lambda v: TaskWise(v, 0.3, Free()))
    trainer = Trainer(max_steps=2, max_epochs=1, log_every_n_steps=1, limit_val_batches=0, **QUIET)
    trainer.fit(module, images(image_folders))
    logged = trainer.logged_metrics
    assert logged.keys() >= {"train/loss", "train/penalty"} | {
        f"train/{kind}/{task}" for kind in ("loss", "marginal_entropy", "top_class_share") for task in CLASSES
    }
    parts = sum(float(logged[f"train/loss/{task}"]) for task in CLASSES) + float(logged["train/penalty"])
    assert float(logged["train/loss"]) == pytest.approx(parts, rel=1e-6)
    for task in CLASSES:
        assert 0 <= float(logged[f"train/marginal_entropy/{task}"]) <= 1 + 1e-6
        assert 1 / 5 <= float(logged[f"train/top_class_share/{task}"]) <= 1


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_the_spread_is_that_of_the_whole_batch(micro_batch, pool, image_folders):
    """What tells a collapse apart must not depend on micro-batches: the last of them may hold one sample."""
    module = module_of(pool, micro_batch=micro_batch)
    trainer = Trainer(max_steps=1, max_epochs=1, log_every_n_steps=1, limit_val_batches=0, **QUIET)
    trainer.fit(module, images(image_folders))
    reference = module_of(pool)
    other = Trainer(max_steps=1, max_epochs=1, log_every_n_steps=1, limit_val_batches=0, **QUIET)
    other.fit(reference, images(image_folders))
    for key in other.logged_metrics:
        assert float(trainer.logged_metrics[key]) == pytest.approx(float(other.logged_metrics[key]), abs=1e-5), key


@pytest.mark.parametrize("lr", [0.0, -1e-3, float("inf"), float("nan")])
def test_a_rate_is_refused_where_it_is_given(lr):
    with pytest.raises(ConfigError, match=r"model\.search\.lr must be positive"):
        Descent(lr=lr)
