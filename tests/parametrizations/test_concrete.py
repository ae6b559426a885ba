"""Concrete: the formula and its gradients in float64, one mask for all experts, nothing kept, what is saved is what is."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adamerge.artifacts.coefficients import Coefficients, load_coefficients, save_coefficients
from adamerge.artifacts.export import export, merged_tensors
from adamerge.errors import CoefficientsError, ConfigError
from adamerge.parametrizations import (
    BinaryMask,
    ChunkWise,
    Concrete,
    ExpectedMask,
    Frozen,
    HardMask,
    LayerWise,
    SoftMask,
    TaskWise,
)
from adamerge.parametrizations.hashed_noise import logistic
from adamerge.task_vectors.task_vectors import TaskVectors

SHAPES = {"a.weight": (6, 5), "b": (7,), "scale": ()}
MASKS = [SoftMask(), SoftMask(3), BinaryMask(), HardMask(), ExpectedMask()]


def given(folder: Path, experts: int = 3) -> dict:
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    save_file(base, folder / "base.safetensors")
    for k in range(experts):
        moved = {name: value + torch.randn(value.shape, generator=generator) for name, value in base.items()}
        save_file(moved, folder / f"e{k}.safetensors")
    return {
        "base": folder / "base.safetensors",
        "experts": {f"e{k}": folder / f"e{k}.safetensors" for k in range(experts)},
    }


@pytest.fixture
def vectors(tmp_path) -> TaskVectors:
    return TaskVectors(**given(tmp_path))


def scrambled(made: Concrete) -> Concrete:
    """Random coefficients and logits."""
    generator = torch.Generator().manual_seed(7)
    made.load_values({n: torch.rand(v.shape, generator=generator) for n, v in made.values().items()})
    made.load_masks({n: torch.randn(v.shape, generator=generator) for n, v in made.masks().items()})
    return made


def mask64(mask: object, name: str, x: Tensor, temperature: float = 0.5) -> Tensor:
    """The papers' masks, differentiable, in float64."""
    if isinstance(mask, ExpectedMask):
        return 1 / (1 + torch.exp(-x))
    if isinstance(mask, HardMask):
        return (1 / (1 + torch.exp(-x)) >= mask.threshold).double()
    noise = logistic((mask.seed, getattr(mask, "draw", None), name), x.numel(), x.device).double().view(x.shape)
    soft = 1 / (1 + torch.exp(-(noise + x) / temperature))
    return (soft > 0.5).double() if isinstance(mask, BinaryMask) else soft


def update64(vectors: TaskVectors, name: str, w: Tensor, x: Tensor, mask: object) -> Tensor:
    """sum_k w_k (tau_k * m / mean(m)), expert by expert as the paper writes it."""
    m = mask64(mask, name, x)
    tau = vectors[name].dense().double()
    return sum(w[k] * (tau[k] * m / m.mean()) for k in range(len(tau)))


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: type(mask).__name__)
def test_update_and_both_gradients_are_those_of_the_formula(vectors, mask):
    made = scrambled(Concrete(vectors, LayerWise, mask=mask))
    for column, name in enumerate(vectors):
        slope = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(1))
        w = made.inner.w.detach().double()[:, column].requires_grad_(True)
        x = made.masks()[name].detach().double().requires_grad_(True)
        expected = update64(vectors, name, w, x, mask)
        update = made(name, vectors[name])
        assert update.shape == SHAPES[name] and update.dtype == torch.float32
        assert torch.allclose(update.double(), expected, rtol=1e-6, atol=1e-6)
        parameters = (made.inner.w, made.masks()[name])
        ours = torch.autograd.grad(update, parameters, slope)
        wanted = torch.autograd.grad(expected, (w, x), slope.double(), allow_unused=True)
        assert (ours[0][:, column].double() - wanted[0]).abs().max() <= 1e-6 * max(1.0, wanted[0].abs().max())
        of_logits = torch.zeros_like(x) if wanted[1] is None else wanted[1]
        assert (ours[1].double() - of_logits).abs().max() <= 1e-6 * max(1.0, of_logits.abs().max())
        if isinstance(mask, SoftMask | ExpectedMask) and name != "scale":
            assert of_logits.abs().max() > 1e-2


def test_the_mean_is_part_of_the_gradient(vectors):
    """Finite differences in float64; and a gradient that takes the mean for a constant is another one."""
    made = scrambled(Concrete(vectors, LayerWise))
    name, slope = "b", torch.randn(7, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(made(name, vectors[name]), made.masks()[name], slope)[0].double()
    w, x = made.values()[name][:, 0].double(), made.masks()[name].detach().double()

    def loss(logits: Tensor) -> Tensor:
        return (update64(vectors, name, w, logits, made.mask) * slope).sum()

    for i in range(7):
        step = torch.zeros(7, dtype=torch.float64)
        step[i] = 1e-5
        assert float(found[i]) == pytest.approx(float((loss(x + step) - loss(x - step)) / 2e-5), abs=1e-6)
    m = mask64(made.mask, name, x)
    constant = slope * (w @ vectors[name].dense().double()) * m * (1 - m) / 0.5 / m.mean()
    assert (found - constant).abs().max() > 1e-2


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: type(mask).__name__)
def test_zero_coefficients_give_the_base_bit_for_bit(vectors, mask):
    made = scrambled(Concrete(vectors, partial(TaskWise, init=0.0), mask=mask))
    made.load_values({name: torch.zeros_like(value) for name, value in made.values().items()})
    for name, tensor in merged_tensors(Coefficients(vectors, made), torch.float32):
        assert torch.equal(tensor.view(torch.int32), vectors.base[name].view(torch.int32))


@pytest.mark.parametrize("inner", [LayerWise, TaskWise, ChunkWise])
def test_a_mask_of_ones_is_no_mask(vectors, inner):
    plain, made = inner(vectors), Concrete(vectors, inner, initial_logit=50.0)
    for name in vectors:
        assert torch.equal(made(name, vectors[name]), plain(name, vectors[name]))
        assert torch.equal(made.draw(3)(name, vectors[name]), plain(name, vectors[name]))


def test_equal_probabilities_are_no_mask_either_without_noise(vectors):
    for mask in (ExpectedMask(), HardMask()):
        plain, made = LayerWise(vectors), Concrete(vectors, LayerWise, mask=mask)
        for name in vectors:
            assert torch.allclose(made(name, vectors[name]), plain(name, vectors[name]), rtol=1e-6)


def test_an_empty_mask_is_no_update_and_no_nan(vectors):
    made = Concrete(vectors, LayerWise, initial_logit=-5.0, mask=HardMask())
    for name in vectors:
        update = made(name, vectors[name])
        assert not update.any()
        gradients = torch.autograd.grad(update.sum(), (made.inner.w, made.masks()[name]))
        assert all(torch.isfinite(gradient).all() and not gradient.any() for gradient in gradients)


def test_draws_differ_repeat_and_are_not_what_is_evaluated(vectors):
    made = scrambled(Concrete(vectors, LayerWise))
    name = "a.weight"
    draws = [made.draw(number)(name, vectors[name]) for number in range(4)]
    declared = made(name, vectors[name])
    assert all(not torch.equal(a, b) for i, a in enumerate([*draws, declared]) for b in draws[:i])
    assert torch.equal(made.draw(2)(name, vectors[name]), draws[2])
    other = scrambled(Concrete(vectors, LayerWise, seed=1))
    assert not torch.equal(other.draw(2)(name, vectors[name]), draws[2])
    assert torch.equal(other(name, vectors[name]), declared)
    for mode in (True, False):  # whatever the mode: what a search sees, it asks for
        made.train(mode)
        assert torch.equal(made(name, vectors[name]), declared)


def test_the_order_of_experts_changes_nothing(tmp_path):
    files = given(tmp_path)
    turned = {**files, "experts": dict(reversed(files["experts"].items()))}
    one, two = (TaskVectors(**each) for each in (files, turned))
    first = scrambled(Concrete(one, LayerWise))
    second = Concrete(two, LayerWise)
    second.load_values({name: value.flip(0) for name, value in first.values().items()})
    second.load_masks({name: value.detach() for name, value in first.masks().items()})
    for name in one:
        assert torch.allclose(first(name, one[name]), second(name, two[name]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: type(mask).__name__)
def test_what_is_evaluated_is_what_is_saved_and_exported(vectors, mask, tmp_path):
    made = scrambled(Concrete(vectors, partial(ChunkWise, chunks=2), temperature=0.3, mask=mask, seed=5))
    path, folder = tmp_path / "coefficients.safetensors", tmp_path / "merged"
    save_coefficients(Coefficients(vectors, made, step=4), path)
    loaded = load_coefficients(path)
    export(loaded, folder)
    written = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name in vectors:
            evaluated = vectors.base[name] + made(name, vectors[name])
            assert torch.equal(written[name], evaluated), name
    save_coefficients(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    table = loaded.mask_table()
    p = made.masks()["b"].detach().sigmoid()
    assert table["b"] == (pytest.approx(float(p.mean())), pytest.approx(float((p > 0.5).float().mean())))


def test_a_mask_from_a_file_is_constant_and_the_new_file_stands_alone(vectors, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    source = scrambled(Concrete(vectors, partial(TaskWise, init=0.3)))
    save_coefficients(Coefficients(vectors, source), first)
    made = Concrete(vectors, LayerWise, mask_from=str(first))
    assert [name for name, p in made.named_parameters() if p.requires_grad] == ["inner.w"]
    name = "a.weight"
    assert all(torch.equal(logits, source.masks()[n]) for n, logits in made.masks().items())
    assert torch.equal(made.draw(0)(name, vectors[name]), made(name, vectors[name])), (
        "the search sees the declared mask"
    )
    assert torch.allclose(made(name, vectors[name]), source.mask and _at(source, 0.3, name, vectors), rtol=1e-6)
    save_coefficients(Coefficients(vectors, made), second)
    first.unlink()
    loaded = load_coefficients(second).parametrization
    assert torch.equal(loaded(name, vectors[name]), made(name, vectors[name]))


def _at(made: Concrete, coefficient: float, name: str, vectors: TaskVectors) -> Tensor:
    made.load_values({group: torch.full_like(value, coefficient) for group, value in made.values().items()})
    return made(name, vectors[name])


def test_a_mask_that_does_not_fit_is_refused(vectors, tmp_path):
    path = tmp_path / "plain.safetensors"
    save_coefficients(Coefficients(vectors, LayerWise(vectors)), path)
    with pytest.raises(ConfigError, match=r"plain\.safetensors is not one of these tensors"):
        Concrete(vectors, LayerWise, mask_from=path)
    with pytest.raises(CoefficientsError, match=r"gone\.safetensors"):
        Concrete(vectors, LayerWise, mask_from=tmp_path / "gone.safetensors")
    with pytest.raises(ConfigError, match="temperature"):
        Concrete(vectors, LayerWise, temperature=0.0)


def test_only_what_is_wanted_is_computed_again(vectors):
    """The combined update is not kept: its second reading happens for the logits' gradient, and only for that."""
    made, reads = scrambled(Concrete(vectors, LayerWise)), []
    deltas = vectors["b"]
    base = deltas.base
    deltas.base = lambda: reads.append(1) or base()
    for wanted, expected in (([made.inner.w], 2), ([made.masks()["b"]], 2), ([made.inner.w, made.masks()["b"]], 3)):
        reads.clear()
        torch.autograd.grad(made("b", deltas).sum(), wanted)
        assert len(reads) == expected


def test_concrete_task_arithmetic_learns_the_mask_alone(vectors):
    made = Concrete(vectors, partial(Frozen, inner=partial(TaskWise, init=0.3)))
    assert [name for name, p in made.named_parameters() if p.requires_grad] == [f"logits.{i}" for i in range(3)]
    assert made.initial == pytest.approx(0.3) and made.coefficients().keys() == {"model"}
