"""Configurations as data: what lies over what, overrides by way of classes, stages in order."""

import pytest
import yaml
from running import METHODS, write_yaml

from adamerge.errors import ConfigError
from adamerge.runs.config_files import config_files, overlaid, overridden, read_config, stages_of

DATA = {"class_path": "adamerge.data.ImageCalibration", "init_args": {"tasks": {}}}


def test_files_are_found_in_both_spellings():
    assert config_files(["--config", "a", "--x=1", "--config=b", "-c", "c", "--config"]) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "message"), [("", "no mapping"), ("- 1", "no mapping"), ("a: [", "not valid YAML"), (None, "no such")]
)
def test_what_is_no_configuration_is_refused(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_config(path)


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
    config = {"model": {"lr": 0.1, "part": {"class_path": "A", "init_args": {"p": 1}}, "experts": {"a": "x"}}}
    words = ["--model.search.lr=0.5", "--model.part.p", "2", "--model.part.init_args.q=[1, 2]", "--model.experts.b=y"]
    assert overridden(config, words) == {
        "model": {
            "lr": 0.5,
            "part": {"class_path": "A", "init_args": {"p": 2, "q": [1, 2]}},
            "experts": {"a": "x", "b": "y"},
        }
    }
    found = overridden(config, ["--model.storage=LowBit", "--model.storage.bits=4", "--model.part=B"])["model"]
    assert found["storage"] == {"class_path": "LowBit", "init_args": {"bits": 4}}
    assert found["part"] == {"class_path": "B"}
    assert config["model"]["lr"] == 0.1 and "storage" not in config["model"]


@pytest.mark.parametrize("words", [["model.search.lr=1"], ["--model.search.lr"], ["--model.search.lr.x=1"]])
def test_what_is_no_override_is_refused(words):
    with pytest.raises(ConfigError, match="override|nothing below"):
        overridden({"model": {"lr": 0.1}}, words)


def test_they_are_read_as_the_command_line_of_a_fit_reads_them(tmp_path):
    """The same files and overrides through the parser that checks every key give the same model."""
    from adamerge.runs.config_parser import Parsed
    from adamerge.runs.instantiate import make_part

    from adamerge.task_vectors.storage import Storage

    pool = write_yaml(
        tmp_path / "pool.yaml", {"model": {"task_vectors": {"base": "b", "experts": {"a": "x"}}}, "data": DATA}
    )
    for method in sorted(METHODS.glob("*.yaml")):
        words = ["--model.storage=LowBit", "--model.storage.bits=4"]
        if "init" in read_config(method)["model"]["parametrization"]["init_args"]:
            words.append("--model.parametrization.init_args.init=0.25")
        found: dict = {}
        for path in (pool, method):
            found = overlaid(found, read_config(path))
        model = overridden(found, words)["model"]
        backbone = "--model.backbone=adamerge.backbones.OpenClipClassifier"
        args = ["--config", str(pool), "--config", str(method), *words, backbone, "--model.backbone.architecture=x"]
        parsed = yaml.safe_load(yaml.safe_dump(Parsed(args).config.as_dict()["model"]))
        theirs, ours = parsed["parametrization"], model["parametrization"]
        assert theirs["class_path"].rpartition(".")[2] == ours["class_path"].rpartition(".")[2]
        given = ours.get("init_args", {})
        assert {key: theirs["init_args"][key] for key in given if not isinstance(given[key], dict)} == {
            key: value for key, value in given.items() if not isinstance(value, dict)
        }
        assert str(make_part(model["storage"], Storage, "s")) == "LowBit(4)"
        assert parsed["storage"]["init_args"] == {"bits": 4}


def test_stages_come_in_the_order_of_their_numbers(tmp_path):
    for name in ("10_j", *(f"{n}_x" for n in range(1, 10))):
        (tmp_path / f"{name}.yaml").write_text("a: 1")
    assert [path.stem for path in stages_of(tmp_path)] == [*(f"{n}_x" for n in range(1, 10)), "10_j"]
    (tmp_path / "other.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="not a method of stages"):
        stages_of(tmp_path)


@pytest.mark.parametrize("text", ["name: 2024-02-30", "lr: !!float x", "a: &a [1, *a]"])
def test_what_yaml_itself_cannot_make_is_told_by_file(text, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match="bad.yaml"):
        read_config(tmp_path / "bad.yaml")
