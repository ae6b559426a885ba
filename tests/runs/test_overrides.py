"""Layers: what lies over what, overrides by way of classes, and arguments that another class takes too."""

import pytest

from adamerge.errors import ConfigError
from adamerge.runs.overrides import as_text, as_yaml, overlaid, overridden


def test_mappings_are_laid_over_each_other_and_classes_replaced():
    below = {"a": {"x": 1, "y": [1, 2]}, "part": {"class_path": "A", "init_args": {"p": 1, "q": 2}}}
    above = {"a": {"y": [3]}, "part": {"class_path": "A", "init_args": {"q": 5}}}
    assert overlaid(below, above) == {
        "a": {"x": 1, "y": [3]},
        "part": {"class_path": "A", "init_args": {"p": 1, "q": 5}},
    }
    other = {"class_path": "B", "init_args": {"r": 1}}
    assert overlaid(below, {"part": other})["part"] == other
    assert overlaid(below, {"part": {"init_args": {"p": 9}}})["part"]["init_args"] == {"p": 9, "q": 2}
    assert below["a"] == {"x": 1, "y": [1, 2]}


def test_overrides_go_by_way_of_classes():
    config = {
        "model": {"search": {"lr": 0.1}, "part": {"class_path": "A", "init_args": {"p": 1}}, "experts": {"a": "x"}}
    }
    words = ["--model.search.lr=0.5", "--model.part.p=2", "--model.part.init_args.q=[1, 2]", "--model.experts.b=y"]
    assert overridden(config, words) == {
        "model": {
            "search": {"lr": 0.5},
            "part": {"class_path": "A", "init_args": {"p": 2, "q": [1, 2]}},
            "experts": {"a": "x", "b": "y"},
        }
    }
    found = overridden(config, ["--model.storage=LowBit", "--model.storage.bits=4", "--model.part=B"])["model"]
    assert found["storage"] == {"class_path": "LowBit", "init_args": {"bits": 4}}
    assert found["part"]["class_path"] == "B" and not found["part"]["init_args"]
    assert config["model"]["search"]["lr"] == 0.1 and "storage" not in config["model"]


@pytest.mark.parametrize("words", [["model.search.lr=1"], ["--model.search.lr"], ["--model.search.lr.x=1"]])
def test_what_is_no_override_is_refused(words):
    with pytest.raises(ConfigError, match="override|nothing below"):
        overridden({"model": {"search": {"lr": 0.1}}}, words)


def test_another_class_keeps_the_arguments_that_it_takes():
    below = {"part": {"class_path": "LayerWise", "init_args": {"init": 0.2, "constraint": {"class_path": "Clamp"}}}}
    chunks = overlaid(below, {"part": {"class_path": "adamerge.ChunkWise", "init_args": {"chunks": 2}}})["part"]
    assert chunks["init_args"] == {"init": 0.2, "constraint": {"class_path": "Clamp"}, "chunks": 2}
    assert overlaid(below, {"part": "Concrete"})["part"] == {"class_path": "Concrete", "init_args": {}}
    assert overlaid(below, {"part": "adamerge.LayerWise"})["part"]["init_args"] == below["part"]["init_args"]
    assert overlaid(below, {"part": None})["part"] is None


@pytest.mark.parametrize("adjusting", [{"labelled": True}, {"init_args": {"labelled": True}}])
def test_arguments_without_a_class_are_those_of_whatever_class_there_is(adjusting):
    """A method may set what it needs of the data, whether it comes before the pool or after it."""
    pool = {"data": {"class_path": "adamerge.ImageCalibration", "init_args": {"labelled": False, "seed": 3}}}
    wanted = {"class_path": "adamerge.ImageCalibration", "init_args": {"labelled": True, "seed": 3}}
    assert overlaid(pool, {"data": adjusting})["data"] == overlaid({"data": adjusting}, pool)["data"] == wanted


@pytest.mark.parametrize(
    ("text", "plain", "typed"),
    [
        ("0.1", "0.1", 0.1), ("3", "3", 3), ("true", "true", True), ("null", None, None), ("a", "a", "a"),
        ("[1, a]", [1, "a"], [1, "a"]), ("{a: 1}", {"a": 1}, {"a": 1}), ("{previous}", "{previous}", "{previous}"),
        ("a: b: c", "a: b: c", "a: b: c"), ("adamerge.storage.Disk", "adamerge.Disk", "adamerge.Disk"),
    ],
)  # fmt: skip
def test_the_value_of_a_word(text, plain, typed):
    assert as_text(text) == plain and as_yaml(text) == typed


def test_a_word_with_a_plus_adds_to_a_list():
    assert overridden({"tasks": ["a"]}, ["--tasks+=b", "--tasks+=[c, d]"]) == {"tasks": ["a", "b", "c", "d"]}
    config = {"trainer": {"callbacks": None}}
    assert overridden(config, ["--trainer.callbacks+=KeepBest"]) == {"trainer": {"callbacks": ["KeepBest"]}}
