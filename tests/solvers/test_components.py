"""Components: each expert's task vector again from its factors, each component that of a decomposition in float64."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from component_files import save_components, with_components
from rounding import UNIT, gamma
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_matrices import dense, factors_of, low_rank_of, taus

import adamerge
from adamerge.errors import CheckpointError, ConfigError
from adamerge.solvers import Components
from adamerge.solvers.matrices import Product, matrices
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import Combine, Scale

SHAPES = {"a.weight": (9, 6), "a.bias": (6,), "b.weight": (4, 3, 2), "scale": (), "row": (1, 5), "none": (0, 3)}
TASKS = ("one", "two", "three")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("components")
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    save_file(base, root / "base.safetensors")
    for task in TASKS:
        moved = {name: own + 0.05 * torch.randn(own.shape, generator=generator) for name, own in base.items()}
        save_file(moved, root / f"{task}.safetensors")
    return {
        "base": str(root / "base.safetensors"),
        "experts": {task: str(root / f"{task}.safetensors") for task in TASKS},
    }


def spectral(tau):
    """Singular values, and the components ``s u v^T``, of a matrix in float64, from eigenvectors of ``tau^T tau``."""
    squares, right = numpy.linalg.eigh(tau.T @ tau)
    order = numpy.argsort(squares)[::-1][: min(tau.shape)]
    parts = [numpy.outer(tau @ right[:, one], right[:, one]) for one in order]
    return numpy.sqrt(squares[order].clip(0)), numpy.stack(parts)


@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (6, 6), (5, 3, 2)])
def test_each_component_is_that_of_the_decomposition(shape):
    values = taus(*shape)
    rows = shape[0]
    for factors, tau in zip(Components().tensors("w", {"w": dense(values)}), values, strict=True):
        matrix = tau.reshape(rows, -1)
        assert factors.shape == (sum(matrix.shape), min(matrix.shape)) and factors.dtype == torch.float32
        left, right = factors[:rows].double(), factors[rows:].double()
        found = torch.einsum("in,jn->nij", left, right).numpy()
        s, parts = spectral(matrix.double().numpy())
        # a rounding of the matrix turns a component by its size over the distance to the next singular value
        gaps = numpy.abs(s[:, None] - s[None] + numpy.eye(len(s)) * s[0]).min(axis=1)
        allowed = 8 * max(matrix.shape) ** 0.5 * UNIT * s[0] * (s / gaps + 1)
        assert (numpy.abs(found - parts).max(axis=(1, 2)) <= allowed).all()
        assert torch.allclose(left.norm(dim=0), right.norm(dim=0), rtol=1e-5), "both have a root of the singular value"
        off = (left @ right.t() - matrix.double()).norm()
        assert off <= 8 * min(matrix.shape) ** 0.5 * UNIT * matrix.double().norm(), "all components are the delta"


@pytest.mark.parametrize(("rank", "kept"), [(None, 6), (4, 4), (99, 6), (0.5, 3), (0.01, 1), (0.99, 5)])
def test_the_largest_are_kept(rank, kept, models, tmp_path):
    vectors = with_components(tmp_path / "c.safetensors", TaskVectors(**models), rank)
    assert vectors.terms("a.weight") == kept
    plain = TaskVectors(**models)["a.weight"].dense().double()
    for found, tau in zip(vectors["a.weight"].dense().double(), plain, strict=True):
        s, _ = spectral(tau.numpy())
        left = float((found - tau).norm())
        assert left == pytest.approx(float(numpy.sqrt((s[kept:] ** 2).sum())), abs=1e-6)


def test_three_numbers_by_hand():
    """Of diag(-9, 4) the roots 3 and 2 of the singular values are on both sides, and the sign is on one."""
    (factors,) = Components().tensors("w", {"w": dense(torch.tensor([[[-9.0, 0.0], [0.0, 4.0]]]))})
    assert torch.allclose(factors.abs(), torch.tensor([[3.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.0, 2.0]]), atol=1e-6)
    products = factors[:2] * factors[2:]
    assert torch.allclose(products, torch.tensor([[-9.0, 0.0], [0.0, 4.0]]), atol=1e-5)


def test_what_is_nothing_but_rounding_is_zero():
    thin = torch.outer(torch.arange(1.0, 7.0), torch.arange(1.0, 6.0))
    one, nothing = Components().tensors("w", {"w": dense(torch.stack([thin, torch.zeros(6, 5)]))})
    assert (one != 0).any(dim=0).tolist() == [True, False, False, False, False] and not nothing.any()


@pytest.mark.parametrize("shape", [(12, 7), (4, 3, 2, 2)])
def test_lora_is_decomposed_through_its_factors(shape, monkeypatch):
    deltas, values = low_rank_of(factors_of(shape, (2, 0, 5)), shape)
    monkeypatch.setattr(Product, "dense", lambda self: pytest.fail("made dense"))
    solver, vectors = Components(), Known(deltas, shape)
    entries = solver.entries("w", vectors)
    made = dict(zip(entries, solver.tensors("w", {"w": deltas}), strict=True))
    columns = torch.Size(shape[1:]).numel()
    ranks = [min(2, shape[0]), min(5, shape[0])]
    assert [tuple(size) for size in entries.values()] == [(shape[0] + columns, rank) for rank in ranks]
    for key, expert in (("one/factors/w", 0), ("three/factors/w", 2)):
        assert made[key].shape == entries[key]
        found = made[key][: shape[0]].double() @ made[key][shape[0] :].t().double()
        tau = values[expert].double().view(shape[0], -1)
        assert (found - tau).norm() <= 64 * UNIT * tau.norm()
        assert torch.allclose(made[key][: shape[0]].norm(dim=0).double() ** 2, torch.linalg.svdvals(tau)[: ranks[1]]
                              [: made[key].shape[1]], rtol=1e-4)  # fmt: skip


class Known:
    """Task vectors of one tensor, as far as the solver asks for them."""

    experts = TASKS

    def __init__(self, deltas, shape):
        self.deltas, self.size = deltas, torch.Size(shape)

    def shape(self, name):
        return self.size

    def unlearned(self, name):
        return self.deltas


def test_the_file_says_what_it_is_and_whose(models, tmp_path):
    vectors = TaskVectors(**models)
    path = save_components(tmp_path / "components.safetensors", vectors)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["adamerge"])
    prints = vectors.fingerprints()
    assert metadata == {
        "format": 1,
        "kind": "task_vectors",
        "version": adamerge.__version__,
        "merged": False,
        "experts": [*TASKS],
        "solver": {"class_path": "adamerge.Components", "init_args": {"rank": None}},
        "base": {"fingerprint": prints["the base"]},
        "experts_from": {task: {"fingerprint": prints[f"expert '{task}'"]} for task in TASKS},
        "transforms": [],
        "protocol": {},
    }
    held = load_file(path)
    assert {value.dtype for value in held.values()} == {torch.float32}
    for task in TASKS:
        assert held[f"{task}/factors/b.weight"].shape == (4 + 6, 4) and held[f"{task}/factors/row"].shape == (6, 1)
        delta = held[f"{task}/delta/a.bias"]
        assert torch.equal(delta, vectors["a.bias"].dense()[TASKS.index(task)]), "what is no matrix is as it was"
    assert len(held) == 3 * len(SHAPES)


def test_transforms_come_first_and_name_the_experts(models, tmp_path):
    transforms = [Combine({"both": {"one": 1.0, "two": -2.0}, "three": {"three": 1.0}}), Scale({"three": 0.5})]
    changed = TaskVectors(**models, transforms=transforms)
    vectors = with_components(tmp_path / "c.safetensors", changed)
    assert vectors.experts == ("both", "three") and vectors.checkpoints.keys() == {*TASKS}
    for name in SHAPES:
        wanted = changed[name].dense().double()
        size = float(TaskVectors(**models)[name].dense().double().norm()) if wanted.numel() else 0.0
        assert (vectors[name].dense().double() - wanted).norm() <= 64 * UNIT * size, name


class Killed(Exception):
    pass


class Dies(Components):
    """Fails at the nth matrix that it decomposes."""

    left = 0

    def tensors(self, name, vectors):
        for tensor in super().tensors(name, vectors):
            if self.left == 0:
                raise Killed
            self.left -= 1
            yield tensor


@pytest.mark.parametrize("before", [0, 2, 4, 10])
def test_a_killed_stage_goes_on_to_the_same_bytes(before, models, tmp_path):
    """Also in the middle of a tensor, of which some experts are written."""
    from adamerge.artifacts.recipe import describe
    from adamerge.solvers.solving import write_task_vectors

    whole = save_components(tmp_path / "whole.safetensors", TaskVectors(**models))
    target, dying, shown = tmp_path / "out" / "components.safetensors", Dies(), []
    dying.left = before
    recipe = describe(Components())
    with pytest.raises(Killed):
        write_task_vectors(target, dying, TaskVectors(**models), recipe=recipe)
    assert not target.exists()
    write_task_vectors(
        target,
        Components(),
        TaskVectors(**models),
        recipe=recipe,
        shown=lambda names: shown.extend(names) or iter(names),
    )
    assert len(shown) == len(SHAPES) - before // 3, "what is done is not done again"
    assert target.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("rank", [0, -1, 1.5, float("nan"), float("inf")])
def test_ranks_that_are_none(rank):
    with pytest.raises(ConfigError, match="rank must be a whole number"):
        Components(rank)


def test_a_matrix_of_each_expert_is_there_at_a_time(monkeypatch):
    alive, most = [], []

    def watched(deltas):
        for matrix in matrices(deltas):
            alive.append(matrix)
            most.append(len(alive))
            yield matrix
            alive.pop()

    monkeypatch.setattr("adamerge.solvers.components.matrices", watched)
    for _ in Components().tensors("w", {"w": dense(taus(6, 5, experts=8))}):
        pass
    assert max(most) == 1 and gamma(1) > 0


def test_it_is_no_task_vector(models, tmp_path):
    path = save_components(tmp_path / "c.safetensors", TaskVectors(**models))
    with pytest.raises(CheckpointError, match="holds components of several experts"):
        TaskVectors(models["base"], {"one": path})
    with pytest.raises(CheckpointError, match="start: .*holds components of several experts"):
        TaskVectors(**models, start=path)
