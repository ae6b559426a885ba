"""The trainer's keys: those of the installed Lightning, with its defaults and plain types."""

import inspect
import types
import typing

import pytest
from lightning import Trainer as Lightnings

from adamerge.runs.trainer_keys import CLASSES, OURS, Trainer, names_classes


def plain(hint: object) -> set[object]:
    """The types of a union that are not classes of Lightning's, without what only Python code can give."""
    options = typing.get_args(hint) if typing.get_origin(hint) in {typing.Union, types.UnionType} else (hint,)
    texts = {"timedelta", "Path"}
    flat = {one for option in options for one in (typing.get_args(option) if "Literal" in str(option) else (option,))}
    return {one for one in flat if getattr(one, "__name__", "") not in texts and "lightning" not in str(one)}


def test_they_are_lightnings():
    theirs, ours = inspect.signature(Lightnings).parameters, inspect.signature(Trainer).parameters
    assert list(theirs) == list(ours)
    hints, own = typing.get_type_hints(Lightnings.__init__), typing.get_type_hints(Trainer)
    for name, one in theirs.items():
        assert ours[name].default == OURS.get(name, one.default), name
        if name not in CLASSES:
            assert plain(own[name]) == plain(hints[name]), name
        else:
            assert "lightning" in str(hints[name]), f"{name} takes no class"
    taking = {name for name, hint in hints.items() if "lightning." in str(hint)}
    assert taking == set(CLASSES)


@pytest.mark.parametrize(
    ("trainer", "classes"),
    [
        ({}, False), ({"max_steps": 3, "logger": False, "callbacks": None, "accelerator": "cpu"}, False),
        ({"logger": "true"}, False), ({"callbacks": []}, False), ({"profiler": "simple"}, False),
        ({"callbacks": ["KeepBest"]}, True), ({"callbacks": "KeepBest"}, True), ({"callbacks": {"class_path": "A"}}, True),
        ({"logger": [{"class_path": "A"}]}, True), ({"strategy": {"class_path": "A"}}, True), ({"plugins": "A"}, True),
    ],
)  # fmt: skip
def test_whether_lightning_must_read_them(trainer, classes):
    assert names_classes(trainer) is classes
