"""Solving: tensor by tensor into a file that a killed solve goes on with, and that says what it was made of."""

import inspect
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adamerge.solvers
from adamerge.artifacts.recipe import describe
from adamerge.errors import DivergedError
from adamerge.solvers import (
    TSVM,
    Components,
    IsoC,
    IsoCTS,
    LeastSquares,
    Scaled,
    Solver,
    SpectralBound,
    WeightedSum,
    Wudi,
    WudiDescent,
)
from adamerge.solvers.solving import solved, write_task_vectors
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import Scale

SHAPES = {"a.weight": (6, 5), "a.bias": (6,), "b.weight": (4, 3, 2), "scale": ()}
SOLVERS = [
    *(WeightedSum(0.4), Wudi(0.5), WudiDescent(1e-3, 5), TSVM(), IsoC(), IsoCTS(), Scaled(Wudi(0.5), 0.3)),
    SpectralBound(Wudi(0.5), dense=0.01),
    Components(),
    LeastSquares(),
]
"""Each solver that there is, with settings under which it does something."""
MERGING = [solver for solver in SOLVERS if solver.single]


@pytest.fixture
def files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    base["steps"] = torch.tensor(7)
    save_file(base, tmp_path / "base.safetensors")
    experts = {}
    for task in ("one", "two", "three"):
        moved = {
            name: value + 0.05 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
            for name, value in base.items()
        }
        save_file(moved, tmp_path / f"{task}.safetensors")
        experts[task] = str(tmp_path / f"{task}.safetensors")
    return {"base": str(tmp_path / "base.safetensors"), "experts": experts}


class NoMaps:
    """Inputs of a network without linear maps."""

    tasks, groups = (), ()

    def begin(self, written):
        """There is nothing to run."""


def write(target, solver, files, **more):
    more |= {"inputs": NoMaps()} if solver.sees_inputs else {}
    write_task_vectors(target, solver, TaskVectors(**files), recipe=describe(solver), **more)
    return load_file(target)


def named(solver):
    return type(solver).__name__


def test_every_solver_is_in_the_sweep():
    public = {getattr(adamerge.solvers, name) for name in adamerge.solvers.__all__}
    assert {type(solver) for solver in SOLVERS} == {kind for kind in public if not inspect.isabstract(kind)}


@pytest.mark.parametrize("solver", MERGING, ids=named)
def test_the_file_holds_each_tensors_delta_in_fp32(solver, files, tmp_path):
    written, vectors = write(tmp_path / "out" / "merged.safetensors", solver, files), TaskVectors(**files)
    assert written.keys() == set(SHAPES) and isinstance(solver, Solver)
    for name in reversed(list(vectors)):  # the order of tensors does not count
        alone = solver.solve(name, vectors)
        assert written[name].dtype == torch.float32 and torch.equal(written[name], alone), name
    changed = [name for name in SHAPES if not torch.equal(written[name], torch.zeros(SHAPES[name]))]
    assert changed == list(SHAPES)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged.safetensors"]


def test_metadata_say_what_it_was_made_of(files, tmp_path):
    target, vectors = tmp_path / "merged.safetensors", TaskVectors(**files)
    write(target, Wudi(0.5), files, protocol={"labelled": False})
    with safe_open(target, "pt") as file:
        metadata = json.loads(file.metadata()["adamerge"])
    prints = vectors.fingerprints()
    assert metadata == {
        "format": 1,
        "kind": "task_vectors",
        "version": adamerge.__version__,
        "merged": True,
        "solver": {"class_path": "adamerge.Wudi", "init_args": {"ridge": 0.5, "vector_scale": None}},
        "base": {"fingerprint": prints["the base"]},
        "experts_from": {task: {"fingerprint": prints[f"expert '{task}'"]} for task in files["experts"]},
        "transforms": [],
        "protocol": {"labelled": False},
    }


def test_transforms_come_first(files, tmp_path):
    solver = WeightedSum(1.0)
    twice = TaskVectors(**files, transforms=[Scale({"one": 2.0})])
    write_task_vectors(
        tmp_path / "m", solver, twice, recipe=describe(solver), transforms=[describe(one) for one in twice.transforms]
    )
    exact = sum(
        row * factor for row, factor in zip(TaskVectors(**files)["a.bias"].dense().double(), (2, 1, 1), strict=True)
    )
    assert (load_file(tmp_path / "m")["a.bias"] - exact).abs().max() < 1e-6


class Killed(Exception):
    pass


class DiesAt(Wudi):
    """Fails at the nth tensor."""

    left = 0

    def solve(self, name, vectors):
        if self.left == 0:
            raise Killed
        self.left -= 1
        return super().solve(name, vectors)


@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_killed_solve_goes_on_to_the_same_bytes(before, files, tmp_path):
    write(tmp_path / "whole.safetensors", Wudi(), files)
    target, dying, count = tmp_path / "out" / "merged.safetensors", DiesAt(), []
    dying.left = before
    with pytest.raises(Killed):
        write_task_vectors(target, dying, TaskVectors(**files), recipe=describe(Wudi()))
    assert not target.exists()
    write(target, Wudi(), files, shown=lambda names: count.append(len(names)) or iter(names))
    assert count == [4 - before], "what was done is not done again"
    assert target.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["merged.safetensors"]


def test_what_is_there_stays_and_another_recipe_takes_its_place(files, tmp_path):
    target, count = tmp_path / "merged.safetensors", []

    def shown(names):
        count.append(len(names))
        return iter(names)

    first = write(target, Wudi(), files, shown=shown)
    write(target, Wudi(), files, shown=shown)
    other = write(target, Wudi(2.0), files, shown=shown)
    assert count == [4, 4] and not torch.equal(first["a.weight"], other["a.weight"])


def test_another_recipe_takes_nothing_over_from_a_killed_solve(files, tmp_path):
    target, dying = tmp_path / "merged.safetensors", DiesAt()
    dying.left = 2
    with pytest.raises(Killed):
        write_task_vectors(target, dying, TaskVectors(**files), recipe=describe(Wudi()))
    again = write(target, Wudi(2.0), files)
    assert all(torch.equal(again[name], value) for name, value in write(tmp_path / "new", Wudi(2.0), files).items())


def test_a_narrower_dtype(files, tmp_path):
    wide, narrow = write(tmp_path / "w", TSVM(), files), write(tmp_path / "n", TSVM(), files, dtype=torch.bfloat16)
    assert all(torch.equal(narrow[name], value.bfloat16()) for name, value in wide.items())


class NotFinite(WeightedSum):
    def solve(self, name, vectors):
        return super().solve(name, vectors) / 0


class Singular(WeightedSum):
    def solve(self, name, vectors):
        return torch.linalg.cholesky(torch.zeros(2, 2))


@pytest.mark.parametrize(("solver", "words"), [(NotFinite(), "NaN or infinite"), (Singular(), "cannot be solved")])
def test_a_delta_that_is_no_number_is_told_by_its_tensor(solver, words, files):
    with pytest.raises(DivergedError, match=f"{named(solver)}: .*'a.bias'.*{words}"):
        list(solved(solver, "a.bias", TaskVectors(**files)))


def test_autocast_changes_nothing(files):
    vectors = TaskVectors(**files)
    plain = [own for solver in SOLVERS for own in solved(solver, "a.weight", vectors)]
    with torch.autocast("cpu", torch.bfloat16):
        again = [own for solver in SOLVERS for own in solved(solver, "a.weight", vectors)]
    assert len(plain) == len(again) and all(map(torch.equal, plain, again))
