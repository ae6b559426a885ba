"""Configurations of a command line: told to be wrong before a library loads, and the whole of each stage as plain data."""

from pathlib import Path

import pytest
from running import write_yaml

from adamerge.errors import ConfigError
from adamerge.runs.command_line import told_apart
from adamerge.runs.configuration import TOP, configurations

MODEL = {"task_vectors": {"base": "b"}, "parametrization": {"class_path": "LayerWise"}}


@pytest.fixture
def pool(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "pool.yaml", {"model": MODEL})
    write_yaml(tmp_path / "model.yaml", MODEL)
    write_yaml(tmp_path / "two" / "1_a.yaml", {"model": {"search": {"lr": 1}}})
    write_yaml(tmp_path / "two" / "2_b.yaml", {"model": {"search": {"lr": 1}}})
    return "pool.yaml"


@pytest.mark.parametrize(
    "words",
    [
        "pool.yaml",
        "pool.yaml two --1.model.search.lr=1 --2.model.search.lr=2",
        "pool.yaml --tasks+=a --seed_everything=3 --model.storage=Disk",
        "two --model=model.yaml",
        "two --model.task_vectors.base=b --model.parametrization=LayerWise",
        "two --1.model.task_vectors.base=b --1.model.parametrization=LayerWise",
        "--help gone",
    ],
)
def test_what_may_be_right_is_let_through(words, pool):
    words = words.replace("gone", "two")
    configurations(told_apart(words.split()))


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("pool.yaml gone.yaml", "no such configuration file: gone.yaml"),
        ("pool.yaml --2.model.search.lr=1", "--2.model.search.lr: there is no stage 2 to override"),
        ("pool.yaml two --3.model.search.lr=1", "--3.model.search.lr: there is no stage 3 to override"),
        ("pool.yaml two --0.model.search.lr=1", "--0.model.search.lr: there is no stage 0 to override"),
        ("pool.yaml --modl.lr=1", "--modl.lr is no key; did you mean 'model.search.lr'?"),
        ("pool.yaml --zzzz=1", "--zzzz is no key"),
        ("two", "model.task_vectors is in none of ['two']"),
        ("pool.yaml --model.parametrization=null", "model.parametrization is in none of ['pool.yaml']"),
        ("", "model.task_vectors is in none of []"),
    ],
)
def test_what_is_known_to_be_wrong_is_refused(words, what, pool):
    with pytest.raises(ConfigError) as found:
        configurations(told_apart(words.split()), "compare")
    assert found.value.what == what
    if what.startswith("model."):
        assert "adamerge compare POOL METHOD" in found.value.todo


def test_a_file_of_a_near_name_is_named(pool):
    with pytest.raises(ConfigError) as found:
        configurations(["pol.yaml"])
    assert found.value.todo == "did you mean pool.yaml?"


def test_the_beginnings_of_keys_are_those_of_the_parser():
    from adamerge.runs.parser import parser_of

    assert {str(action.dest).partition(".")[0] for action in parser_of({})._actions} - {"help"} == set(TOP)


def test_each_stage_has_its_files_and_words(pool):
    words = "pool.yaml --tasks=[a] two --2.model.search.lr=2 --config more.yaml"
    write_yaml(Path("more.yaml"), {"name": "x"})
    one, two = configurations(words.split())
    assert (one.number, two.number, one.file, two.file) == (1, 2, Path("two/1_a.yaml"), Path("two/2_b.yaml"))
    assert one.files == (Path("pool.yaml"), Path("two/1_a.yaml"), Path("more.yaml"))
    assert one.plain["model"]["search"]["init_args"] == {"lr": 1} and one.plain["name"] == "x"
    assert (
        two.plain["model"]["search"]["init_args"] == {"lr": 2}
        and two.content["model"]["search"]["init_args"]["lr"] == "2"
    )
    (only,) = configurations(["pool.yaml"])
    assert (only.number, only.file) == (0, None)


def test_where_no_class_is_named_there_is_one(pool):
    plain = configurations(["pool.yaml", "--data=null"])[0].plain
    assert plain["data"] == {"class_path": "adamerge.NoData"}
    assert plain["model"]["search"] == {"class_path": "adamerge.Descent"}


def test_what_stands_for_files_is_replaced_anywhere(pool):
    words = [
        "two",
        "pool.yaml",
        "--2.model.init_from={previous}",
        "--2.data={class_path: A, init_args: {x: ['{run}/y']}}",
    ]
    found = configurations(words)[1].placed({"{previous}": "one", "{run}": "two"}).plain
    assert found["model"]["init_from"] == "one" and found["data"]["init_args"]["x"] == ["two/y"]


def test_the_first_stage_has_none_before_it(pool):
    with pytest.raises(ConfigError, match=r"two/1_a.yaml: the first stage has no stage before it"):
        configurations(["pool.yaml", "two", "--model.init_from={previous}"])


STAGES = [(1, "stage 1, two/1_a.yaml: a", "b"), (2, "stage 2, two/2_b.yaml: a", "b (--2")]


@pytest.mark.parametrize(("number", "begun", "todo"), STAGES)
def test_an_error_says_of_which_stage_it_is(number, begun, todo, pool):
    stage = configurations(["pool.yaml", "two"])[number - 1]
    with pytest.raises(ConfigError) as found, stage.named():
        raise ConfigError("a", todo="b")
    assert found.value.what == begun and found.value.todo.startswith(todo)
    with pytest.raises(ConfigError) as again, stage.named():
        raise found.value
    assert again.value.what == begun, "and says it once"


def test_a_group_may_be_a_file_of_its_own(pool):
    write_yaml(Path("model.yaml"), MODEL)
    for words in (["two", "--model=model.yaml"], ["two", "other.yaml"]):
        write_yaml(Path("other.yaml"), {"model": "model.yaml"})
        assert configurations(words)[0].plain["model"]["task_vectors"] == {"base": "b"}
