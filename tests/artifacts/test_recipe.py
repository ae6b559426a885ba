"""Recipes: what is described is built again, plain data all the way; nothing but parts of recipes is ever built."""

from __future__ import annotations

import functools
import json
import sys

import pytest
import torch

from adamerge.artifacts.recipe import build, build_factory, describe
from adamerge.errors import AdamergeError, CoefficientsError
from adamerge.parametrizations import ChunkWise, LayerWise, Parametrization
from adamerge.parametrizations.constraints import Clamp, Constraint, Free, Projection
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.transforms import Ties, Transform


@pytest.fixture(scope="module")
def vectors() -> TaskVectors:
    base, one, other = (
        {"a.weight": torch.full((3, 2), value), "b": torch.full((4,), value)} for value in (0.0, 1.0, 2.0)
    )
    return TaskVectors(base, {"one": one, "other": other})


def test_a_factory_is_described_and_built_as_a_factory(vectors):
    spec = json.loads(json.dumps(describe(functools.partial(ChunkWise, init=0.2, chunks=4, constraint=Free()))))
    assert spec["class_path"] == "adamerge.ChunkWise"
    built = build_factory(spec, Parametrization)(vectors)
    assert (type(built), built.init, built.chunks, type(built.constraint)) == (ChunkWise, 0.2, 4, Free)


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "builtins.eval",
        "adamerge.artifacts.export.json.JSONDecoder",
        "adamerge..os.system",
        "adamerge.errors.x.y",
    ],
)
@pytest.mark.parametrize("kind", [Transform, Constraint, Parametrization])
def test_nothing_but_parts_is_built(path, kind):
    with pytest.raises(CoefficientsError):
        build({"class_path": path, "init_args": {}}, kind)
    with pytest.raises(CoefficientsError):
        build_factory({"class_path": path, "init_args": {}}, kind)


def test_the_program_itself_is_no_part(monkeypatch):
    """``adamerge.__main__`` runs the command line when it is imported."""
    monkeypatch.setattr(sys, "argv", ["adamerge", "--help"])
    with pytest.raises(CoefficientsError):
        build({"class_path": "adamerge.__main__.Ties", "init_args": {}}, Transform)


def test_a_part_must_be_of_its_kind(vectors):
    with pytest.raises(CoefficientsError, match="not a Transform"):
        build({"class_path": "adamerge.constraints.Clamp", "init_args": {}}, Transform)
    spec = {
        "class_path": "adamerge.parametrizations.ChunkWise",
        "init_args": {"constraint": {"class_path": "adamerge.transforms.Ties", "init_args": {}}},
    }
    with pytest.raises((CoefficientsError, AdamergeError, TypeError, AttributeError)):
        build_factory(spec, Parametrization)(vectors)


def test_a_parametrization_inside_another_is_built_as_a_factory():
    spec = {
        "class_path": "adamerge.parametrizations.LayerWise",
        "init_args": {"init": {"class_path": "adamerge.parametrizations.ChunkWise", "init_args": {}}},
    }
    assert build_factory(spec, Parametrization).keywords["init"].func is ChunkWise


def test_the_shape_of_a_recipe():
    """What other programs read: public names and constructor arguments, nothing else."""
    assert describe(Ties(0.3)) == {"class_path": "adamerge.Ties", "init_args": {"keep": 0.3}}
    spec = describe(functools.partial(LayerWise, constraint=Clamp(-1.0, 2.0)))
    constraint = {"class_path": "adamerge.Clamp", "init_args": {"low": -1.0, "high": 2.0}}
    assert spec == {"class_path": "adamerge.LayerWise", "init_args": {"constraint": constraint}}
    plain = [None, True, 3, 0.1, "text"]
    assert describe(plain) == plain and describe(tuple(plain)) == plain


def test_a_parametrization_is_described_without_its_task_vectors(vectors):
    parametrization = ChunkWise(vectors, init=0.2, chunks=3, constraint=Projection(-0.5, 0.5))
    spec = json.loads(json.dumps(describe(parametrization)))
    assert spec["init_args"].keys() == {"init", "chunks", "constraint"}
    again = build_factory(spec, Parametrization)(vectors)
    assert json.loads(json.dumps(describe(again))) == spec
    assert (again.constraint.low, again.constraint.high) == (-0.5, 0.5)


def test_floats_come_back_to_the_bit():
    for keep in (0.1, 1 / 3, 5e-324, 0.1 + 0.2):
        assert build(json.loads(json.dumps(describe(Ties(keep)))), Transform).keep == keep


@pytest.mark.parametrize(
    "spec",
    [
        None, 5, "adamerge.transforms.Ties", [], {}, {"class_path": "adamerge.transforms.Ties"}, {"init_args": {}},
        {"class_path": "adamerge.transforms.Ties", "init_args": 5}, {"class_path": None, "init_args": {}},
        {"class_path": ["adamerge.transforms.Ties"], "init_args": {}},
    ],
    ids=str,
)  # fmt: skip
def test_what_describes_no_part_is_shown(spec):
    with pytest.raises(CoefficientsError, match="describes no part"):
        build(spec, Transform)


def test_a_foreign_class_needs_its_prefix_and_is_named():
    """``fractions.Fraction`` stands for someone's own part; a prefix is a whole name, not its beginning."""
    spec = {"class_path": "fractions.Fraction", "init_args": {}}
    for plugins in ([], ["frac"], [""], ["fractions.more"]):
        with pytest.raises(CoefficientsError, match=r"'fractions\.Fraction', which is not part of adamerge") as found:
            build(spec, object, plugins)
        assert "--allow-plugins fractions" in found.value.todo
    assert build(spec, object, ["fractions"]) == 0 and build(spec, object, ["other", "fractions."]) == 0
    with pytest.raises(CoefficientsError, match="is not a Transform"):
        build(spec, Transform, ["fractions"])
    inside = {"class_path": "adamerge.parametrizations.LayerWise", "init_args": {"constraint": spec}}
    with pytest.raises(CoefficientsError, match="not a part of a recipe"):
        build_factory(inside, Parametrization, ["fractions"])


def test_no_prefix_opens_the_package_itself(monkeypatch):
    """A run's configuration names ``adamerge.Something``; nothing private becomes reachable by that."""
    for path in (
        "adamerge.artifacts.export.export",
        "adamerge.cli.main",
        "adamerge.io.model_folder.Layout",
        "adamerge.io.atomic._remove",
    ):
        for plugins in (["adamerge"], ["adamerge."], [path], [path.rpartition(".")[0]]):
            with pytest.raises(CoefficientsError, match=f"'{path}', which does not exist"):
                build({"class_path": path, "init_args": {}}, object, plugins)
    with pytest.raises(CoefficientsError, match="not a type"):
        build({"class_path": "adamerge.load_coefficients", "init_args": {}}, type)


def test_former_homes_are_looked_up_and_not_imported(monkeypatch):
    gone = {"adamerge.gone.deep.Ties": "adamerge.Ties", "adamerge.gone.Clamp": "adamerge.Clamp"}
    monkeypatch.setattr("adamerge.io.public_names.FORMER", gone)
    assert build({"class_path": "adamerge.gone.deep.Ties", "init_args": {"keep": 0.3}}, Transform).keep == 0.3
    inside = {"class_path": "adamerge.gone.Clamp", "init_args": {"low": -1.0}}
    spec = {"class_path": "adamerge.LayerWise", "init_args": {"constraint": inside}}
    assert build_factory(spec, Parametrization).keywords["constraint"].low == -1.0


@pytest.mark.parametrize("name", ["Nothing", "", "TIES", "Ties.apply"])
def test_a_class_that_does_not_exist_is_named(name):
    with pytest.raises(CoefficientsError, match="adamerge.transforms"):
        build({"class_path": f"adamerge.transforms.{name}", "init_args": {}}, Transform)
