"""The command line: quick help, verbs, exit codes, and every verb from end to end on a tiny pool."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CLASSES
from running import child, command, environment, fit_words, pool_config, without_pictures, write_yaml
from safetensors.torch import load_file

import adamerge
from adamerge import errors
from adamerge.cli import VERBS, main
from adamerge.runs.fit import fit

CODES = {
    errors.ConfigError: 2,
    errors.CheckpointError: 3,
    errors.CoefficientsError: 3,
    errors.DataError: 3,
    errors.DivergedError: 4,
    errors.CollapsedError: 4,
    errors.ExportError: 5,
}


@pytest.fixture
def run(pool, image_folders, tmp_path, monkeypatch):
    """A finished run of three steps."""
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    file = write_yaml(tmp_path / "tiny.yaml", pool_config(pool, image_folders))
    return fit(fit_words(file, "--name=n", "--id=a", "--model.search.lr=0.05"))


def loaded_by(tmp_path: Path, code: str) -> set[str]:
    """Modules that a child has loaded after ``code``."""
    done = child(["-c", f"import sys\n{code}\nprint(*sys.modules, file=sys.stderr)"], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(done.stderr.split())


@pytest.mark.parametrize("words", [["--help"], ["-h"], [], ["help"], ["--version"]])
def test_help_needs_no_torch(words, tmp_path):
    loaded = loaded_by(tmp_path, f"from adamerge.cli import main\nassert main({words}) == 0")
    assert not loaded & {"torch", "lightning", "transformers", "open_clip", "wandb", "jsonargparse", "numpy"}


def test_export_inspect_and_check_need_no_lightning(tmp_path):
    code = (
        "from adamerge.cli import main\nfor verb in ('export', 'inspect', 'check'):\n    try:\n"
        "        main([verb, '--help'])\n    except SystemExit as end:\n        assert not end.code"
    )
    loaded = loaded_by(
        tmp_path,
        f"{code}\nimport adamerge.artifacts.export, adamerge.artifacts.coefficients\n"
        "import adamerge.runs.inspection, adamerge.runs.check",
    )
    assert not loaded & {"lightning", "pytorch_lightning", "open_clip", "wandb", "datasets", "torchmetrics"}


def test_help_names_every_verb_and_code(capfd):
    outcome = command(capfd, "--help")
    assert outcome.code == 0 and all(f"\n  {verb} " in outcome.out for verb in VERBS)
    assert all(str(code) in outcome.out for code in (0, 2, 3, 4, 5, 130, 143))


def test_version(capfd):
    assert command(capfd, "--version").out.strip() == adamerge.__version__


@pytest.mark.parametrize(
    ("word", "near"), [("exprot", "export"), ("fitt", "fit"), ("compar", "compare"), ("zzz", None)]
)
def test_an_unknown_verb_is_refused_with_the_nearest(word, near, capfd):
    outcome = command(capfd, word)
    assert outcome.code == 2 and f"'{word}'" in outcome.error
    assert near is None or f"'{near}'" in outcome.error
    assert outcome.err.splitlines()[0] == outcome.error


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capfd):
    outcome = command(capfd, verb, "--help")
    assert outcome.code == 0 and "usage" in outcome.out.lower() and f"adamerge {verb}" in outcome.out


def test_help_of_fit_is_the_docstrings(capfd):
    text = " ".join(command(capfd, "fit", "--help").out.split())
    for words in (
        "--model.search.lr", "learning rate, of every parameter group",
        "--model.micro_batch", "samples per forward pass, of whatever task",
        "--model.init_from", "a coefficient file of the same groups and experts to start from",
        "--model.objective", "what drives the coefficients", "--model.task_weights", "--resume", "--runs", "--name", "--id",
    ):  # fmt: skip
        assert words in text, words


def test_fit_without_arguments_shows_its_help(capfd):
    outcome = command(capfd, "fit")
    assert outcome.code == 0 and "--model.search.lr" in outcome.out


@pytest.mark.parametrize("verb", ["test", "export", "inspect", "compare"])
def test_a_verb_without_its_arguments_is_a_usage_error(verb, capfd):
    assert command(capfd, verb).code == 2


@pytest.mark.parametrize("kind", CODES, ids=lambda kind: kind.__name__)
def test_exit_codes(kind, capfd, monkeypatch):
    def fail(arguments):
        raise kind("what happened", where="a/file", expected=1, got=2, todo="do this")

    monkeypatch.setitem(VERBS, "fit", fail)
    outcome = command(capfd, "fit")
    assert outcome.code == CODES[kind]
    lines = ["error: what happened", "  where: a/file", "  expected 1, got 2", "  what to do: do this"]
    assert outcome.err.splitlines() == lines
    with pytest.raises(kind):
        main(["fit", "--debug"])


def test_debug_may_stand_anywhere(capfd, tmp_path):
    absent = str(tmp_path / "gone")
    for words in (["--debug", "inspect", absent], ["inspect", "--debug", absent], ["inspect", absent, "--debug"]):
        with pytest.raises(errors.AdamergeError):
            main(words)
    assert command(capfd, "inspect", absent).code == 3


def test_every_error_has_a_tested_code():
    found = {
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.AdamergeError)
    }
    assert found - {errors.AdamergeError} == set(CODES)


def test_interrupt(monkeypatch, capfd):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(VERBS, "fit", interrupt)
    assert command(capfd, "fit").code == 130


@pytest.mark.parametrize("words", [["--help"], ["inspect", "MODEL"]], ids=["help", "inspect"])
def test_a_reader_that_leaves_early_is_no_error(words, pool, tmp_path):
    words = [pool["base"] if word == "MODEL" else word for word in words]
    line = [sys.executable, "-m", "adamerge", *words]
    with subprocess.Popen(
        line, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 0 and error == "", error


def test_export_from_end_to_end(run, tmp_path, capfd):
    file, target = run / "coefficients.safetensors", tmp_path / "merged"
    outcome = command(capfd, "export", file, target)
    assert outcome.code == 0 and str(target) in outcome.out, outcome.err
    assert {path.name for path in target.iterdir()} >= {
        "open_clip_model.safetensors",
        "open_clip_config.json",
        "README.md",
    }
    assert f"M numbers, 0.00 GB in float32\nexported: {target}" in outcome.out
    again = command(capfd, "export", file, target)
    assert again.code == 5 and "merged" in again.error and "--overwrite" in again.err
    assert command(capfd, "export", file, target, "--overwrite", "--dtype=bfloat16", "--shard-size=0.1").code == 0
    assert command(capfd, "export", file, target, "--overwrite", "--shard-size=0").code == 2
    weights = load_file(target / "open_clip_model.safetensors")
    assert {value.dtype for value in weights.values() if value.is_floating_point()} == {torch.bfloat16}


@pytest.mark.slow
def test_open_clip_loads_what_is_exported_over_an_export(run, tmp_path, capfd):
    file, target = run / "coefficients.safetensors", tmp_path / "merged"
    assert command(capfd, "export", file, target).code == 0
    assert command(capfd, "export", file, target, "--overwrite", "--dtype=bfloat16", "--shard-size=0.1").code == 0
    weights = load_file(target / "open_clip_model.safetensors")
    code = f"import open_clip\nprint(len(open_clip.create_model('local-dir:{target}', require_pretrained=True).state_dict()))"
    done = child(["-c", code], tmp_path)
    assert int(done.stdout) == len(weights), done.stderr[-2000:]


def test_export_refuses_moved_and_changed_models_unless_told(run, pool, tmp_path, capfd):
    file = run / "coefficients.safetensors"
    expert = Path(pool["experts"]["colours"])
    copy = tmp_path / "moved.safetensors"
    copy.write_bytes(expert.read_bytes())
    assert command(capfd, "export", file, tmp_path / "a", f"--expert=colours={copy}").code == 0
    other = f"--expert=colours={pool['experts']['shapes']}"
    outcome = command(capfd, "export", file, tmp_path / "b", other)
    assert outcome.code == 3 and "colours" in outcome.error and not (tmp_path / "b").exists()
    outcome = command(capfd, "export", file, tmp_path / "b", f"--expert=colors={copy}")
    assert outcome.code == 3 and "colors" in outcome.error
    outcome = command(capfd, "export", file, tmp_path / "b", "--expert=colours")
    assert outcome.code in (2, 3) and not (tmp_path / "b").exists()
    assert command(capfd, "export", file, tmp_path / "b", other, "--allow-other-models").code == 0
    assert command(capfd, "export", tmp_path / "gone.safetensors", tmp_path / "c").code == 3
    assert command(capfd, "export", copy, tmp_path / "c").code == 3
    assert command(capfd, "export", file, pool["base"], "--overwrite").code == 5


def test_test_writes_into_the_summary(run, capfd):
    before = json.loads((run / "summary.json").read_text())
    outcome = command(capfd, "test", run)
    assert outcome.code == 0, outcome.err[-2000:]
    assert all(task in outcome.out for task in (*CLASSES, "average"))
    after = json.loads((run / "summary.json").read_text())
    scores = after.pop("test")
    assert after == before
    assert scores["per_task"].keys() == CLASSES.keys()
    assert scores["average"] == pytest.approx(sum(scores["per_task"].values()) / 2)
    assert command(capfd, "test", run, "--split=validation").code == 0
    both = json.loads((run / "summary.json").read_text())
    assert both["test"] == scores and both["validation"]["per_task"].keys() == CLASSES.keys()
    assert command(capfd, "test", run, "--split=train").code == 2


HALVED = """
from adamerge import Entropy


class Halved(Entropy):
    def forward(self, output, batch):
        return super().forward(output, batch) / 2
"""


def test_classes_of_the_working_directory_are_found_by_the_installed_command(
    pool, image_folders, tmp_path, monkeypatch, capfd
):
    """Which has its own folder before all others, not the one it is called in."""
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in {"", str(tmp_path / "mine")}])
    Path("halved_paper.py").write_text(HALVED)
    file = write_yaml(tmp_path / "tiny.yaml", pool_config(pool, image_folders))
    given = fit_words(file, "--trainer.fast_dev_run=true", "--model.objective=halved_paper.Halved")
    outcome = command(capfd, "fit", *given)
    assert outcome.code == 0, outcome.err[-2000:]
    assert sys.path[-1] == str(tmp_path / "mine"), "what is installed comes first"


def test_test_of_what_is_no_run(tmp_path, capfd):
    outcome = command(capfd, "test", tmp_path)
    assert outcome.code == 2 and "config.yaml" in outcome.error


def test_test_of_a_run_without_coefficients(run, capfd):
    (run / "coefficients.safetensors").unlink()
    outcome = command(capfd, "test", run)
    assert outcome.code == 3 and "coefficients.safetensors" in outcome.error


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["run"], ("run", "test", [], [], [])),
        (["run", "pool.yaml"], ("run", "test", ["pool.yaml"], [], [])),
        (["pool.yaml", "run"], ("run", "test", ["pool.yaml"], [], [])),
        (["--config", "pool.yaml", "run", "-c", "b.yml"], ("run", "test", ["pool.yaml", "b.yml"], [], [])),
        (
            ["run", "--split", "validation", "--data.batch_size", "3", "--allow-plugins=mine"],
            ("run", "validation", [], ["mine"], ["--data.batch_size=3"]),
        ),
    ],
)
def test_a_test_takes_its_files_and_overrides_in_any_order(words, given, capfd, monkeypatch):
    asked = []
    monkeypatch.setattr("adamerge.runs.scoring.score_run", lambda *arguments: (asked.append(arguments), None))
    monkeypatch.setattr("adamerge.runs.scoring.print_scores", lambda scores, metric: None)
    assert command(capfd, "test", *words).code == 0
    run, split, pools, plugins, overrides = asked[0]
    assert (str(run), split, [str(one) for one in pools], plugins, overrides) == given


@pytest.mark.parametrize("words", [["pool.yaml"], ["one", "two"], []])
def test_a_test_is_of_one_run(words, capfd):
    outcome = command(capfd, "test", *words)
    assert outcome.code == 2 and "which run?" in outcome.err
