"""The configurations: each names what exists, and runs, with the pool before or after the method."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from running import METHODS, ROOT, coefficients, command, same_coefficients

CONFIGS = ROOT / "configs"
METHOD_FILES = sorted(METHODS.rglob("*.yaml"))
# what a person gives to --config: a file, or a folder of stages
GIVEN = sorted(path for path in METHODS.iterdir() if path.is_dir() or path.suffix == ".yaml")
POOL_FILES = sorted((CONFIGS / "pools").glob("*.yaml"))
TRAINER_FILES = sorted((CONFIGS / "trainer").glob("*.yaml"))
NAMES = {
    "atlas_negation": ["--model.task_weights={colours: -1.0}", "--leave_out=[shapes]"]
}  # what a method must be told
QUICK = ("--trainer.enable_progress_bar=false", "--data.batch_size=4")


def name_of(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


def entries(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every (key, leaf) of a configuration."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield from entries(value, name)
    elif isinstance(node, list):
        for value in node:
            yield from entries(value, key)
    else:
        yield key, node


def test_there_is_something_to_test():
    assert len(METHOD_FILES) >= 9 and POOL_FILES and TRAINER_FILES


@pytest.mark.parametrize("path", [*METHOD_FILES, *POOL_FILES, *TRAINER_FILES], ids=name_of)
def test_every_class_exists(path):
    for key, value in entries(yaml.safe_load(path.read_text(encoding="utf-8"))):
        if key == "class_path":
            module, _, name = value.rpartition(".")
            assert isinstance(getattr(importlib.import_module(module), name), type), value


@pytest.mark.parametrize("path", METHOD_FILES, ids=name_of)
def test_a_method_says_nothing_of_models_and_data(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content.keys() <= {"model", "trainer", "data", "search"}
    assert content.get("data", {}).keys() <= {"labelled", "shots", "batch_size", "train_samples"}, (
        "what is read of data, not which"
    )
    assert not content["model"].keys() & {"backbone"}
    vectors = dict(content["model"].get("task_vectors", {}))
    added = vectors.pop("experts", {})  # but for what a stage of its own has solved
    assert set(added.values()) <= {"{task_vectors}"} and not vectors.keys() & {"base", "include", "exclude"}


QUICKLY = {
    "adamerging_layer_wise",
    "atlas_addition",
    "expert_merging",
    "task_arithmetic",
    "wudi",
}
"""One method of each kind; the others are slow tests."""
RUN = [path if path.stem in QUICKLY else pytest.param(path, marks=pytest.mark.slow) for path in GIVEN]


@pytest.mark.parametrize("path", RUN, ids=name_of)
def test_a_method_runs_in_either_order(path, pool_file, capfd):
    pool_words, method_words = ["--config", str(pool_file)], ["--config", str(path)]
    steps = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", *QUICK, *NAMES.get(path.stem, [])]
    for name, words in (("a", pool_words + method_words), ("b", method_words + pool_words)):
        outcome = command(capfd, "fit", *words, *steps, "--name=n", f"--id={name}")
        assert outcome.code == 0, outcome.err[-2000:]
        assert json.loads((Path("runs/n") / name / "summary.json").read_text())["status"] == "finished"
    if path.stem != "wudi_strength":
        assert same_coefficients(Path("runs/n/a"), Path("runs/n/b"))
        return
    (first,), (second,) = (coefficients(Path("runs/n") / name).values() for name in "ab")
    assert torch.allclose(first, second.roll(-1, 0), rtol=1e-4, atol=1e-6), (
        "the expert that it adds comes first or last"
    )


@pytest.mark.parametrize("path", [path for path in TRAINER_FILES if path.stem != "gpu"], ids=name_of)
def test_a_trainer_runs(path, pool_file, capfd):
    words = ["--config", pool_file, "--config", METHODS / "adamerging_task_wise.yaml", "--config", path]
    steps = [] if path.stem == "debug" else ["--trainer.max_steps=2"]
    outcome = command(capfd, "fit", *words, *steps, *QUICK, "--id=a")
    assert outcome.code == 0, outcome.err[-2000:]
    summary = json.loads(Path("runs/tiny-adamerging_task_wise/a/summary.json").read_text())
    assert summary["status"] == "finished" and summary["step"] == (3 if path.stem == "debug" else 2)


def test_the_gpu_trainer_is_read_on_any_machine(pool_file, capfd):
    words = ["--config", pool_file, "--config", METHODS / "adamerging_task_wise.yaml"]
    outcome = command(capfd, "fit", *words, "--config", CONFIGS / "trainer/gpu.yaml", "--print_config")
    assert outcome.code == 0 and "bf16-mixed" in outcome.out and "accelerator: gpu" in outcome.out


@pytest.mark.parametrize("path", [path for path in POOL_FILES if path.stem.startswith("testbed_")], ids=name_of)
def test_a_pool_names_what_is_there(path, monkeypatch):
    from adamerge.runs.instantiate import Configured

    monkeypatch.chdir(ROOT)
    vectors = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["task_vectors"]
    cli = Configured.of(["--config", str(path), "--config", str(METHODS / "task_arithmetic.yaml")])
    assert cli.model.merged.task_vectors.experts == tuple(vectors["experts"])
    assert set(vectors["experts"]) <= set(cli.datamodule.tasks)


@pytest.mark.parametrize("path", POOL_FILES, ids=name_of)
def test_a_pool_is_read_without_opening_what_it_names(path, monkeypatch, capfd):
    """Every key and class of it; with any method, and those of the testbed in either order."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    either = [path, METHODS / "ties.yaml"]
    for order in (either, either[::-1]) if path.stem.startswith("testbed_") else (either,):
        words = [word for file in order for word in ("--config", file)]
        outcome = command(capfd, "fit", *words, "--print_config")
        assert outcome.code == 0, outcome.err[-2000:]
        printed = yaml.safe_load(outcome.out)
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
        experts = printed["model"]["task_vectors"]["init_args"]["experts"]
        assert experts == given["model"]["task_vectors"]["experts"]
        assert printed["data"]["class_path"] == given["data"]["class_path"]


def test_the_testbeds_tasks_and_experts_have_the_same_names():
    from adamerge.testbed.data import TestbedImages

    vectors = yaml.safe_load((CONFIGS / "pools/testbed_images.yaml").read_text())["model"]["task_vectors"]
    assert set(vectors["experts"]) == set(TestbedImages().tasks)
