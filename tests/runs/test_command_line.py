"""Words of a command line: told apart in every spelling, and wrong ones refused by what they are."""

from pathlib import Path

import pytest
from running import write_yaml

from adamerge.errors import ConfigError
from adamerge.runs.command_line import Words, stage_of, told_apart, words_of_fits


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
    assert told_apart(found.in_order) == found, "the same again"


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


def test_the_overrides_of_a_stage_come_after_those_of_all():
    words = told_apart(["a", "--2.x=2", "--x=1", "--1.y", "3"])
    assert words.of_stage(1) == ["--x=1", "--y=3"] and words.of_stage(2) == ["--x=1", "--x=2"]
    assert words.of_stage(0) == ["--x=1"] and [stage_of(word) for word in words.overrides] == [2, None, 1]


def test_overrides_of_stages_are_for_methods_that_have_some(tmp_path):
    (tmp_path / "staged").mkdir()
    staged, plain, shared = tmp_path / "staged", Path("m.yaml"), Words(["more.yaml"], ["--x=1", "--2.x=2"])
    fits = words_of_fits(Path("p.yaml"), [staged, plain], shared)
    assert fits[staged] == Words(["p.yaml", str(staged), "more.yaml"], ["--x=1", "--2.x=2"])
    assert fits[plain] == Words(["p.yaml", "m.yaml", "more.yaml"], ["--x=1"])
    assert words_of_fits(Path("p.yaml"), [plain], shared)[plain].overrides == shared.overrides, "and is refused"
