"""Signatures: the first fault by types, in one line that names the key; what may be right is no fault."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from adamerge import Constraint, Objective, Parametrization, TaskVectors, Transform
from adamerge.data import ImageCalibration
from adamerge.runs.signatures import argument_fault, fault
from adamerge.training import Merging

Factory = Callable[[TaskVectors], Parametrization]


IMAGES = {"class_path": "ImageCalibration", "tasks": {"a": {"data": "x"}}}


def chunks(**given: Any) -> dict[str, Any]:
    return {"class_path": "ChunkWise", "init_args": given}


@dataclass
class Row:
    name: str
    count: int = 1
    more: dict[str, float] = field(default_factory=dict)


class Whole:
    def __init__(self, rows: dict[str, Row], rate: float = 1.0, made_by: Callable[[int], Optimizer] = Adam) -> None:
        pass


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (1, float), ("1e-3", float), (3, int), ("3", int), (True, bool), ("a", str), (3, str), ("a", Path),
        (None, int | None), ([1, 2], list[int]),
        ([1], Sequence[int]), ({"a": 1}, dict[str, float]), (3, Any), (64, Literal[64, 32]),
        ("auto", str | Objective), ("Entropy", Objective), ("adamerge.objectives.Entropy", Objective | None),
        ({"class_path": "LayerWise", "init_args": {"init": 0.3}}, Factory),
        ({"class_path": "LayerWise", "init": 0.3, "constraint": "Projection"}, Factory),
        (["Ties", {"class_path": "Scale", "init_args": {"factors": {"a": 1}}}], Sequence[Transform]),
        ({"base": "b", "experts": {"a": "x"}}, TaskVectors), ("SGD", Callable[[Any], Optimizer]),
        ({"class_path": "StepLR", "init_args": {"step_size": 3}}, Callable[[Optimizer], LRScheduler] | None),
        ({"a": {"name": "b", "more": {"x": 1}}}, dict[str, Row]),
    ],
)  # fmt: skip
def test_what_may_be_right_is_no_fault(value, hint):
    assert fault("k", value, hint) is None


@pytest.mark.parametrize(
    ("value", "hint", "what"),
    [
        ("fast", float, "k: 'fast' is no number"),
        (True, float, "k: True is no number"),
        ("2.5", int, "k: '2.5' is no whole number"),
        ("many", int | None, "k: 'many' is no whole number"),
        ("perhaps", bool, "k: 'perhaps' is no switch (true or false)"),
        ("a", list[str] | None, "k: 'a' is no list, such as [a, b]"),
        (3, dict[str, float] | None, "k: 3 is no mapping, such as {a: 1}"),
        ({"a": "b"}, dict[str, float], "k.a: 'b' is no number"),
        ([1, "x"], list[int], "k[1]: 'x' is no whole number"),
        (17, Literal[64, "32"] | None, "k: 17 is none of 64, 32"),
        (None, Objective, "k is missing"),
        ("Entrpy", Objective | None, "k: there is no objective 'Entrpy'; did you mean 'Entropy'?"),
        ("pathlib.Path", Objective | None, "k: pathlib.Path is no Objective"),
        ("Entropy", Constraint, "k: Entropy is no Constraint"),
        (3, Objective, "k: 3 is no Objective"),
        (chunks(chunk=3), Factory, "k.chunk is no argument of ChunkWise; did you mean 'k.chunks'?"),
        (chunks(chunks="x"), Factory, "k.chunks: 'x' is no whole number"),
        (chunks() | {"init_args": [3]}, Factory, "k.init_args: [3] is no mapping, such as {a: 1}"),
        (chunks(constraint="Fre"), Factory, "k.constraint: there is no constraint 'Fre'; did you mean 'Free'?"),
        ("Concrete", Factory, "k.inner is missing: Concrete needs it"),
        ({"class_path": "Concrete", "inner": "Zzz"}, Factory, "k.inner: there is no parametrization 'Zzz'"),
        (["Tie"], Sequence[Transform], "k[0]: there is no transform 'Tie'; did you mean 'Ties'?"),
        ({"init_args": {}}, Factory, "k: it is not said which Parametrization"),
        ({"a": {"nme": "b"}}, dict[str, Row], "k.a.nme is no argument of Row; did you mean 'k.a.name'?"),
        ({"a": {"name": "b", "more": {"x": "y"}}}, dict[str, Row], "k.a.more.x: 'y' is no number"),
        (IMAGES, ImageCalibration, "k.tasks.a.data is no argument of ImageTask; did you mean 'k.tasks.a.dataset'?"),
    ],
)  # fmt: skip
def test_the_first_fault_is_told_by_its_key(value, hint, what):
    assert fault("k", value, hint).what == what


def test_a_class_that_stands_by_default_takes_the_arguments():
    assert argument_fault("k", Whole, {"rows": {}, "made_by": {"weight_decay": 0.1}}) is None
    found = argument_fault("k", Whole, {"rows": {}, "made_by": {"weight_decy": 0.1}})
    assert found.what == "k.made_by.weight_decy is no argument of Adam; did you mean 'k.made_by.weight_decay'?"


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({}, "model.parametrization is missing: Merging needs it"),
        ({"learning_rate": 1}, "model.learning_rate is no argument of Merging; did you mean 'model.search.lr'?"),
        ({"max_steps": 1}, "model.max_steps is no argument of Merging; did you mean 'trainer.max_steps'?"),
        ({"zzzzz": 1}, "model.zzzzz is no argument of Merging"),
    ],
)
def test_arguments_of_a_search(given, what):
    assert argument_fault("model", Merging, given).what == what


def test_what_takes_any_argument_is_not_judged():
    def anything(a: int = 1, **others: Any) -> None:
        pass

    assert argument_fault("k", anything, {"b": 3}) is None and argument_fault("k", anything, {"a": "x"}) is not None


def test_of_two_ways_to_give_a_schedule_the_one_that_is_named_is_told_of():
    given = {
        "search": {"class_path": "Descent", "schedule": "torch.optim.lr_scheduler.StepLR"},
        "parametrization": "TaskWise",
    }
    found = argument_fault("model", Merging, given)
    assert found is not None and found.what.startswith("model.search.schedule.step_size is missing")
