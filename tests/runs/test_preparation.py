"""Preparation: what can be known before a fit is refused before it, and leaves nothing behind."""

from pathlib import Path

import pytest
import torch
import yaml
from running import METHODS, QUICK, TASK_ARITHMETIC, command, fit_words, write_yaml

from adamerge.backbones import OpenClipClassifier
from adamerge.errors import ConfigError, DataError
from adamerge.objectives import Entropy, PseudoLabel, Sum
from adamerge.objectives.views import FlipAndShift
from adamerge.runs.configuration import configurations
from adamerge.runs.preparation import checked, validated, waiting

FEWSHOT = METHODS / "atlas_fewshot.yaml"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--trainer.max_epochs=0"], "max_epochs=0"),
        (["--trainer.limit_train_batches=0"], "limit_train_batches=0"),
        (["--trainer.limit_train_batches=0.5"], "limit_train_batches=0.5"),
        (["--trainer.overfit_batches=1"], "overfit_batches=1"),
        (["--trainer.max_time=00:00:00:00"], "max_time"),
        (["--trainer.max_steps=0"], "max_steps"),
        (["--trainer.val_check_interval=50"], "val_check_interval=50"),
        (["--model.copy=ShardedCopy"], "several processes"),
        (["--model.search.schedule=CosineAnnealingLR", "--model.search.schedule.T_max=100"], "T_max=100"),
    ],
)  # fmt: skip
def test_a_fit_that_could_not_be_leaves_nothing(words, named, pool_file, capfd):
    outcome = command(capfd, "fit", *fit_words(pool_file, *words))
    assert outcome.code == 2 and named in outcome.error, outcome.err[-2000:]
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("staged", [False, True])
def test_what_lightning_finds_out_where_it_sets_up_leaves_nothing(staged, pool_file, tmp_path, monkeypatch, capfd):
    """Heads are made there: of templates that are none, for example."""

    def refuse(self, tasks, experts):
        raise DataError("task 'colours': a template is none")

    method = METHODS / "adamerging_task_wise.yaml"
    if staged:
        content = yaml.safe_load(method.read_text())
        for name in ("1_a", "2_b"):
            write_yaml(tmp_path / "twice" / f"{name}.yaml", content)
        method = tmp_path / "twice"
    monkeypatch.setattr(OpenClipClassifier, "build_heads", refuse)
    outcome = command(capfd, "fit", *fit_words(pool_file, method=method))
    assert outcome.code == 3 and "a template is none" in outcome.error
    assert not Path("runs").exists()


def test_the_choice_of_a_step_is_possible_before_the_fit(pool_file, capfd):
    """The rule of negation needs a task to forget."""
    outcome = command(capfd, "fit", *fit_words(pool_file, method=METHODS / "atlas_negation.yaml"))
    assert outcome.code == 2 and "LowestTarget needs a task to forget" in outcome.error
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("samples", "classes", "named"),
    [
        ([{"input_ids": torch.zeros(4, dtype=torch.int64)}], 3, "FlipAndShift is for images"),
        ([torch.zeros(3, 8, 8, dtype=torch.uint8)], 0, "0 classes"),
        ([torch.zeros(3, 8, 8)], 3, "FlipAndShift is for images"),
    ],
)
def test_an_objective_says_that_data_cannot_serve_it(samples, classes, named):
    objective = PseudoLabel(weak=FlipAndShift())
    for asked in (objective, Sum([Entropy(), objective])):
        with pytest.raises(ConfigError, match="cannot learn task 'prose'") as refusal:
            asked.check("prose", samples, classes)
        assert named in str(refusal.value) and refusal.value.todo


def test_one_that_the_data_can_serve_is_content():
    images = [torch.zeros(3, 8, 8, dtype=torch.uint8)]
    PseudoLabel(weak=FlipAndShift()).check("pictures", images, 2)
    Entropy().check("prose", [{"input_ids": torch.zeros(4)}], 0)


def test_it_is_asked_before_the_run_folder_exists(pool_file, monkeypatch, capfd):
    def refuse(self, task, samples, classes):
        raise ConfigError(f"no use for {task}, of {classes} classes, {samples[0].dtype}")

    monkeypatch.setattr(Entropy, "check", refuse)
    outcome = command(capfd, "fit", *fit_words(pool_file))
    assert outcome.code == 2 and "no use for colours, of " in outcome.error and "uint8" in outcome.error
    assert not Path("runs").exists()


# no data ----------------------------------------------------------------------------------------------------------


def test_a_pool_without_data_to_a_merged_folder_in_one_command(pool_file, capfd):
    from safetensors.torch import load_file

    content = yaml.safe_load(pool_file.read_text())
    pool, vectors = {"model": content["model"]}, content["model"]["task_vectors"]
    bare = write_yaml(pool_file.parent / "bare.yaml", pool)
    outcome = command(capfd, "fit", "--config", bare, "--config", TASK_ARITHMETIC, "--id=a", "--export", "merged")
    assert outcome.code == 0, outcome.err[-2000:]
    base = load_file(Path(vectors["base"]) / "open_clip_model.safetensors")
    experts = [load_file(path) for path in vectors["experts"].values()]
    merged = load_file("merged/open_clip_model.safetensors")
    for name, value in experts[0].items():
        right = base[name].double() + 0.3 * sum(expert[name].double() - base[name].double() for expert in experts)
        assert (merged[name].double() - right).abs().max() <= 2**-22 * max(1.0, float(value.abs().max()))
    run = Path("runs/bare-task_arithmetic/a")
    assert command(capfd, "fit", "--resume", run).code == 0
    outcome = command(capfd, "test", run)
    assert outcome.code == 2 and "there are no data to score on" in outcome.error
    outcome = command(capfd, "fit", "--config", bare, "--config", TASK_ARITHMETIC, "--id=b", "--export", "merged")
    assert outcome.code == 5 and "merged exists" in outcome.error and not run.with_name("b").exists()
    outcome = command(capfd, "compare", bare, TASK_ARITHMETIC, "--folder", "table")
    assert outcome.code == 2 and "there are no data to score on" in outcome.error and not Path("table").exists()


@pytest.mark.parametrize("method", [METHODS / "adamerging_task_wise.yaml", FEWSHOT], ids=lambda path: path.stem)
def test_an_objective_without_data_is_refused(method, pool_file, capfd):
    outcome = command(capfd, "fit", *fit_words(pool_file, "--data=null", method=method))
    assert outcome.code == 2 and "needs data, and there are none" in outcome.error
    assert not Path("runs").exists()


def test_null_stands_for_no_data_in_a_word_and_in_a_file(pool_file, capfd):
    null = write_yaml(pool_file.with_name("null.yaml"), {**yaml.safe_load(pool_file.read_text()), "data": None})
    for pool, words in ((pool_file, ["--data=null"]), (pool_file, ["--data", "null"]), (null, [])):
        outcome = command(capfd, "fit", "--config", pool, "--config", TASK_ARITHMETIC, *words)
        assert outcome.code == 0, outcome.err[-2000:]


@pytest.mark.parametrize("name", ["concrete_adamerging_task_wise", "expert_merging_plusplus"])
def test_what_earlier_stages_have_yet_to_write_is_no_fault(name, pool_file):
    """A mask of the first stage, importances of its tensors, a folder of the run."""
    first = validated(configurations(["--config", str(pool_file), "--config", str(METHODS / name), *QUICK]))
    assert first.settings.trainer.max_steps == (2000 if "concrete" in name else 50)
    assert sorted(path.name for path in Path().iterdir()) == ["pools"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"objective": {"class_path": "adamerge.CrossEntropy"}}, "CrossEntropy needs labels"),
        pytest.param({"search": {"lr": -1.0}}, "model.search.lr", marks=pytest.mark.slow),
        (
            {"lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 5000}}},
            "step_size=5000",
        ),
    ],
)
def test_a_fault_of_the_second_stage_is_told_before_the_first_is_fitted(change, named, pool_file, tmp_path, capfd):
    content = yaml.safe_load((METHODS / "adamerging_task_wise.yaml").read_text())
    write_yaml(tmp_path / "twice" / "1_a.yaml", content)
    later = {**content["model"], "init_from": "{previous}", **change}
    write_yaml(tmp_path / "twice" / "2_b.yaml", {**content, "model": later})
    arguments = ["--config", str(pool_file), "--config", str(tmp_path / "twice"), *QUICK]
    with pytest.raises(ConfigError, match=named):
        validated(configurations(arguments))
    with pytest.raises(ConfigError, match=named):
        checked(configurations(arguments))
    outcome = command(capfd, "fit", *arguments)
    assert outcome.code == 2 and named in outcome.error and not Path("runs").exists()


def test_only_what_names_the_file_to_come_is_left_at_that(pool_file):
    first, second = configurations([str(pool_file), str(METHODS / "expert_merging_plusplus")])
    with waiting(second):
        raise FileNotFoundError(2, "no such file", "{previous}")
    for stage, error in ((first, FileNotFoundError(2, "no", "{previous}")), (second, FileNotFoundError(2, "no", "x"))):
        with pytest.raises(FileNotFoundError), waiting(stage):
            raise error
