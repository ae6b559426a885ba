"""Words of a command line: told apart in every spelling, and wrong ones refused by what they are."""

import pytest
from running import write_yaml

from adamerge.errors import ConfigError
from adamerge.runs.command_line import TOP, Words, refuse_early, told_apart

MODEL = {"task_vectors": {"base": "b"}, "parametrization": {"class_path": "LayerWise"}}


@pytest.mark.parametrize(
    ("words", "files", "overrides", "flags"),
    [
        ("", "", "", ""),
        ("a.yaml b", "a.yaml b", "", ""),
        ("--config a --config=b -c c d", "a b c d", "", ""),
        ("--model.search.lr=1 a --model.search.lr 2", "a", "--model.search.lr=1 --model.search.lr=2", ""),
        ("--model.search.lr -0.1", "", "--model.search.lr=-0.1", ""),
        ("--2.model.search.lr 3 a", "a", "--2.model.search.lr=3", ""),
        ("--tasks+ b", "", "--tasks+=b", ""),
        ("a --help --print_config", "a", "", "--help --print_config"),
        ("--print_config=skip_default a", "a", "", "--print_config=skip_default"),
        ("--model.backbone.help CausalLM a", "a", "", "--model.backbone.help=CausalLM"),
        ("--model.backbone.help --model.search.lr=1", "", "--model.search.lr=1", "--model.backbone.help"),
        ("--model.backbone.help=CausalLM a", "a", "", "--model.backbone.help=CausalLM"),
    ],
)
def test_words_are_told_apart(words, files, overrides, flags):
    found = told_apart(words.split())
    assert found == Words(files.split(), overrides.split(), flags.split())
    assert told_apart(found.for_parser) == found, "the same again"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("--config", "--config has no value"),
        ("--model.search.lr --model.micro_batch=3", "--model.search.lr has no value"),
        ("-lr 3", "there is no option -lr"),
        ("model.search.lr=3", "'model.search.lr=3' has no dashes; did you mean --model.search.lr=3?"),
    ],
)
def test_what_is_none_of_them_is_refused(words, what):
    with pytest.raises(ConfigError) as found:
        told_apart(words.split())
    assert found.value.what == what


def test_a_file_may_have_an_equals_sign_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "lr=3", {})
    assert told_apart(["lr=3", "./b=c.yaml"]).files == ["lr=3", "./b=c.yaml"]


@pytest.fixture
def pool(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_yaml(tmp_path / "pool.yaml", {"model": MODEL})
    write_yaml(tmp_path / "two" / "1_a.yaml", {"model": {"lr": 1}})
    write_yaml(tmp_path / "two" / "2_b.yaml", {"model": {"lr": 1}})
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
    refuse_early(told_apart(words.split()), "fit")


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
        refuse_early(told_apart(words.split()), "compare")
    assert found.value.what == what
    if what.startswith("model."):
        assert "adamerge compare POOL METHOD" in found.value.todo


def test_a_file_of_a_near_name_is_named(pool):
    with pytest.raises(ConfigError) as found:
        refuse_early(told_apart(["pol.yaml"]), "fit")
    assert found.value.todo == "did you mean pool.yaml?"


def test_the_beginnings_of_keys_are_those_of_the_parser():
    from adamerge.runs.config_parser import ConfigCLI

    class Keys(ConfigCLI):
        def parse_arguments(self, parser, args):
            raise ConfigError(" ".join({str(action.dest).partition(".")[0] for action in parser._actions}))

    with pytest.raises(ConfigError) as found:
        Keys([])
    assert {*found.value.what.split()} - {"config", "help", "print_config", "=="} == set(TOP)
