"""AdaRank's mask: 0 or 1 forwards, the sigmoid's gradient backwards, times the coefficients of what is inside."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from component_files import with_components

from adamerge.artifacts.coefficients import Coefficients, load_coefficients, save_coefficients
from adamerge.artifacts.export import merged_tensors
from adamerge.errors import ConfigError
from adamerge.parametrizations import BlockWise, ChunkWise, ComponentWise, Concrete, LayerWise, RankMask, TaskWise
from adamerge.parametrizations.constraints import Clamp
from adamerge.task_vectors.task_vectors import TaskVectors

SHAPES = {"conv": (3, 2, 4), "matrix": (5, 7), "vector": (6,)}
TASKS = ("one", "two", "three")


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    root = tmp_path_factory.mktemp("file")
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    experts = {
        task: {name: own + 0.5 * torch.randn(own.shape, generator=generator) for name, own in base.items()}
        for task in TASKS
    }
    return with_components(root / "components.safetensors", TaskVectors(base, experts))


def parts_of(vectors, name):
    """``(experts, n, *shape)`` in float64, the components ``u v^T`` of the file."""
    own = vectors.components
    factors = torch.stack([own[f"{task}/factors/{name}"] for task in TASKS]).double()
    rows = SHAPES[name][0]
    return torch.einsum("kin,kjn->knij", factors[:, :rows], factors[:, rows:]).view(3, -1, *SHAPES[name])


def randomised(parametrization, seed=2):
    generator = torch.Generator().manual_seed(seed)
    parametrization.load_masks(
        {n: 0.2 * torch.randn(x.shape, generator=generator) for n, x in parametrization.masks().items()}
    )
    parametrization.load_values(
        {g: torch.rand(x.shape, generator=generator) for g, x in parametrization.values().items()}
    )
    return parametrization


def test_by_hand(tmp_path):
    """Of diag(-9, 4) the first component alone, times 0.5; both logits have a gradient, of c s u^T G v m (1 - m) / T."""
    given = TaskVectors({"w": torch.zeros(2, 2)}, {"one": {"w": torch.tensor([[-9.0, 0.0], [0.0, 4.0]])}})
    own = with_components(tmp_path / "c.safetensors", given)
    parametrization = RankMask(own, partial(LayerWise, init=0.5), keep=0.5, temperature=2.0, initial_logit=2.0)
    assert parametrization.masks()["w"].tolist() == [[2.0, -2.0]]
    update = parametrization("w", own["w"])
    assert torch.allclose(update, torch.tensor([[-4.5, 0.0], [0.0, 0.0]]), atol=1e-5)
    update.backward(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
    # sigmoid(1) (1 - sigmoid(1)) = 0.1966119 on both sides of 0
    slopes = torch.tensor([[0.5 * -9 * 0.1966119 / 2, 0.5 * 12 * 0.1966119 / 2]])
    assert torch.allclose(parametrization.masks()["w"].grad, slopes, rtol=1e-5)
    assert torch.allclose(parametrization.inner.w.grad, torch.tensor([[-9.0]]), rtol=1e-5), "of what is merged"


@pytest.mark.parametrize("inner", [TaskWise, BlockWise, LayerWise])
def test_update_and_straight_through_gradient_are_the_papers(vectors, inner):
    parametrization = randomised(RankMask(vectors, inner, temperature=0.3))
    layers = inner(vectors)
    layers.load_values(parametrization.values())
    for name in ("conv", "matrix"):
        parametrization.zero_grad()
        parts, logits = parts_of(vectors, name), parametrization.masks()[name]
        c = layers.shares(name)[0].detach().double()
        kept = (1 / (1 + torch.exp(-logits.detach().double() / 0.3)) > 0.5).double()
        assert 0 < kept.mean() < 1
        wanted = torch.einsum("kn,kn...->...", c * kept, parts)
        update = parametrization(name, vectors[name])
        assert (update.detach().double() - wanted).abs().max() < 1e-5
        slope = torch.randn(SHAPES[name])
        update.backward(slope)
        products = (parts * slope.double()).flatten(2).sum(dim=2)
        soft = torch.sigmoid(logits.detach().double() / 0.3)
        off = logits.grad.double() - c * products * soft * (1 - soft) / 0.3
        assert off.abs().max() <= 1e-5 * products.abs().max()
        found = parametrization.inner.w.grad.sum(dim=1).double()
        assert (found - (kept * products).sum(dim=1)).abs().max() <= 1e-5 * products.abs().max()


def test_all_kept_is_what_is_inside(vectors):
    parametrization, layers = RankMask(vectors, LayerWise), LayerWise(vectors)
    for name in vectors:
        off = parametrization(name, vectors[name]) - layers(name, vectors[name])
        assert off.abs().max() <= 1e-6
    assert torch.equal(parametrization("vector", vectors["vector"]), layers("vector", vectors["vector"]))


def test_none_kept_gives_the_base_bit_for_bit(vectors):
    parametrization = RankMask(vectors, LayerWise, keep=0.0)
    for name in ("conv", "matrix"):
        update = parametrization(name, vectors[name])
        assert torch.equal(vectors.base[name] + update, vectors.base[name])


@pytest.mark.parametrize(("keep", "first"), [(1.0, 5), (0.5, 2), (0.16, 0), (0.0, 0)])
def test_a_share_of_the_largest_is_kept_at_first(vectors, keep, first):
    logits = RankMask(vectors, LayerWise, keep=keep).masks()["matrix"]
    wanted = torch.cat([torch.full((3, first), 0.1), torch.full((3, 5 - first), -0.1)], dim=1)
    assert torch.equal(logits.detach(), wanted)


def test_the_constraint_inside_holds(vectors):
    clamped = partial(LayerWise, constraint=Clamp(0.0, 0.5))
    parametrization = RankMask(vectors, clamped)
    parametrization.load_values({group: torch.full_like(x, 9.0) for group, x in parametrization.values().items()})
    wanted = 0.5 * vectors["matrix"].dense().sum(dim=0)
    assert torch.allclose(parametrization("matrix", vectors["matrix"]), wanted, atol=1e-6)


def test_the_file_keeps_mask_and_coefficients(vectors, tmp_path):
    parametrization = randomised(RankMask(vectors, LayerWise, keep=0.5))
    path = tmp_path / "c.safetensors"
    experts = {task: dict(own) for task, own in vectors.checkpoints.items()}
    save_coefficients(Coefficients(vectors, parametrization), path)
    loaded = load_coefficients(path, base=dict(vectors.base), experts=experts)
    for name, value in merged_tensors(loaded, torch.float32):
        with torch.no_grad():
            assert torch.equal(value, vectors.base[name] + parametrization(name, vectors[name])), name
    shares = loaded.mask_table()
    assert shares.keys() == {"conv", "matrix"}
    assert shares["matrix"][1] == float((parametrization.masks()["matrix"] > 0).float().mean()), "the rank that is left"


def test_what_does_not_go_inside(vectors):
    with pytest.raises(ConfigError, match="RankMask: ChunkWise has more than one coefficient for 'conv'"):
        RankMask(vectors, ChunkWise)
    with pytest.raises(ConfigError, match="ComponentWise has more than one coefficient"):
        RankMask(vectors, ComponentWise)
    with pytest.raises(ConfigError, match="Concrete has more than one coefficient"):
        RankMask(vectors, partial(Concrete, inner=LayerWise))
    with pytest.raises(ConfigError, match="RankMask: 'conv' has no components"):
        RankMask(TaskVectors(vectors.base, vectors.checkpoints), LayerWise)


@pytest.mark.parametrize("given", [{"keep": -0.1}, {"keep": 1.5}, {"temperature": 0.0}, {"initial_logit": 0.0}])
def test_numbers_out_of_range(vectors, given):
    with pytest.raises(ConfigError, match=f"RankMask: {next(iter(given))} must be"):
        RankMask(vectors, LayerWise, **given)


def test_no_other_mask_goes_around_it(vectors):
    """Of two masks a file would keep one."""
    with pytest.raises(ConfigError, match="Concrete: RankMask has a mask already"):
        Concrete(vectors, partial(RankMask, inner=LayerWise))
