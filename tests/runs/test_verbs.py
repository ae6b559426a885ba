"""Verbs that take a pool and a method: every row of the table of command lines, and what is known before libraries load."""

from pathlib import Path

import pytest
from command_line_rows import answers, rows, set_out
from running import LAYER_WISE, child, command, import_anew, pool_config, write_yaml

ROWS = rows()
SAMPLE = 4  # one row of so many is in every run of the tests, all are in the slow one


@pytest.fixture
def place(pool, image_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import_anew(monkeypatch, "mypaper")
    set_out(tmp_path, pool, image_folders)
    return tmp_path


def some_of_them():
    for i, row in enumerate(ROWS):
        yield pytest.param(row, id=row["name"], marks=() if i % SAMPLE == 0 else pytest.mark.slow)


def said(answer, place, pool):
    code, line = answer
    return [code, line.replace(str(place), "HERE").replace(pool["base"], "BASE")]


def as_in_the_table(answer, expected):
    code, line = expected
    return answer[0] == code and (answer[1].startswith(line[:-1]) if line.endswith("…") else answer[1] == line)


@pytest.mark.parametrize("row", some_of_them())
def test_a_command_line_is_answered_as_the_table_says(row, place, pool):
    found = {verb: said(answer, place, pool) for verb, answer in answers(row, place).items()}
    assert as_in_the_table(found["fit"], row["answer"]), found["fit"]
    assert found["check"] == found["fit"]
    assert not list(place.rglob("runs")), "nothing is written"


def test_the_table_holds_right_and_wrong_lines():
    assert (
        len({row["words"] + str(row.get("files")) for row in ROWS}) == len(ROWS) == len({row["name"] for row in ROWS})
    )
    right = [row for row in ROWS if row["answer"][0] == 0]
    assert len(ROWS) >= 105 and 20 <= len(right) <= len(ROWS) / 2
    for row in ROWS:
        assert row["answer"][0] in {0, 2, 3} and len(row["answer"][1]) < 300, row["name"]
        assert row.keys() <= {"name", "words", "files", "dry", "answer"}, row["name"]


def test_positional_files_make_the_run_of_named_ones(place, capfd):
    """The same configuration, whichever way its files are named."""
    shown = [
        command(capfd, "fit", *words, "--print_config").out
        for words in (["pool.yaml", "method.yaml"], ["--config", "pool.yaml", "--config=method.yaml"])
    ]
    assert shown[0] == shown[1] and "Entropy" in shown[0]


BEFORE = """
import sys
from adamerge.cli import main
for words in {words}:
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    print("code", code, sorted({{"torch", "lightning", "numpy", "jsonargparse"}} & set(sys.modules)))
"""


def test_what_can_be_known_is_told_before_a_library_loads(tmp_path):
    """A missing file took 9.8 seconds to be told, and the help 6.5: both without torch now, in a fraction of its import."""
    pool = write_yaml(tmp_path / "pool.yaml", pool_config({"base": "b", "experts": {"a": "x"}}, {"a": "y"}))
    (tmp_path / "twice.yaml").write_text("model: {lr: 1.0}\nmodel: {}\n")
    (tmp_path / "trainner.yaml").write_text("trainner: {max_steps: 3}\n")
    both = [str(pool), str(LAYER_WISE)]
    told = [
        *([verb, *both, "gone.yaml"] for verb in ("fit", "check", "compare")),
        *([verb, *both, "--2.model.search.lr=1"] for verb in ("fit", "check", "compare")),
        ["fit", *both, "twice.yaml"], ["fit", *both, "trainner.yaml"], ["fit", *both, "model.search.lr=3"],
        ["fit", str(pool)],
        ["check", str(LAYER_WISE)], ["compare", *both, "--trainner.max_steps=3"],
    ]  # fmt: skip
    helped = [["fit", "--help"], ["fit"], ["fit", "--model.backbone.help=CausalLM"], ["fit", "--data.help"]]
    helped += [[verb, "--help"] for verb in ("check", "compare", "test", "export", "inspect")]
    done = child(["-c", BEFORE.format(words=[*told, *helped])], tmp_path)
    codes = [line for line in done.stdout.splitlines() if line.startswith("code ")]
    assert codes == ["code 2 []"] * len(told) + ["code 0 []"] * len(helped), done.stderr[-2000:]


def test_trainer_keys_are_shown_on_request_alone(capfd):
    own, lightnings = command(capfd, "fit", "--help").out, command(capfd, "fit", "--trainer.help").out
    assert len(own.splitlines()) < 110 and "--trainer.limit_predict_batches" not in own
    assert "--trainer.limit_predict_batches" in lightnings and "--model.search.lr" not in lightnings


def test_help_that_only_a_library_has_is_the_parsers(capfd):
    outcome = command(capfd, "fit", "--model.search.optimizer.help=torch.optim.AdamW")
    assert outcome.code == 0 and "weight_decay" in outcome.out
    flag = "--model.search.inner_optimizer.help=torch.optim.AdamW"  # of the search that is named alone
    outcome = command(capfd, "fit", "--model.search=Bilevel", flag)
    assert outcome.code == 0 and "weight_decay" in outcome.out and "inner_optimizer" in outcome.out
    assert command(capfd, "fit", flag).code == 2
    former = command(capfd, "fit", "--model.optimizer.help=torch.optim.AdamW")
    assert former.code == 0 and "weight_decay" in former.out


@pytest.mark.parametrize("words", [[], ["--2.model.search.lr=0.5"]])
def test_compare_reads_its_words_as_the_others_do(words, place, capfd, monkeypatch):
    given = []
    monkeypatch.setattr("adamerge.runs.compare.compare", lambda *arguments, choices: given.append(arguments))
    monkeypatch.setattr("adamerge.runs.compare.print_table", lambda result: None)
    line = ["compare", "--folder", "here", "pool.yaml", "staged", "--model.search.lr", "0.1", "method.yaml", *words]
    assert command(capfd, *line).code == 0
    methods = [Path("staged"), Path("method.yaml")]
    assert given == [(Path("pool.yaml"), methods, Path("here"), ["--model.search.lr=0.1", *words], None)]
    write_yaml(place / "more.yaml", {"trainer": {"max_steps": 2}})
    assert command(capfd, "compare", "pool.yaml", "method.yaml", "--config", "more.yaml", "-cmore.yaml").code == 0
    assert given[-1][1:4] == ([Path("method.yaml")], Path("runs/comparison"), ["--config=more.yaml"] * 2), (
        "for every fit"
    )
    outcome = command(capfd, "compare", "pool.yaml", "method.yaml", "gone.yaml")
    assert outcome.code == 2 and outcome.error == "error: no such configuration file: gone.yaml"
