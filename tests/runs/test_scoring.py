"""Scoring: a run that was fitted block by block is scored block by block, with the scores of the whole copy."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import yaml
from pico import TASKS, TEXTS, pico_pool
from running import LAYER_WISE, METHODS, QUICK, command, fit_words, without_pictures, write_yaml

from adamerge.errors import ConfigError
from adamerge.merging.block_copy import Block, BlockCopy
from adamerge.merging.copies import WholeCopy
from adamerge.merging.sharded_copy import ShardedCopy
from adamerge.runs.scoring import copy_for_scores, run_copy, score_run


@pytest.fixture
def pool_file(tmp_path, monkeypatch) -> Path:
    """A pico llama, two experts, and texts with labels in all splits."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    without_pictures(monkeypatch)
    pool = pico_pool("llama", tmp_path / "models")
    tasks = {}
    for task in TASKS:
        rows = datasets.Dataset.from_dict({"text": [f"{TEXTS[i % 3]} {task} {i}" for i in range(9)]})
        datasets.DatasetDict(dict.fromkeys(("calibration", "test"), rows)).save_to_disk(tmp_path / task)
        tasks[task] = {"dataset": str(tmp_path / task)}
    backbone = {"class_path": "adamerge.backbones.CausalLM", "init_args": {"model": pool["base"]}}
    vectors = {"base": pool["base"], "experts": pool["experts"]}
    data = {"class_path": "adamerge.data.LanguageCalibration", "init_args": {"tasks": tasks}}
    return write_yaml(tmp_path / "pool.yaml", {"model": {"backbone": backbone, "task_vectors": vectors}, "data": data})


@pytest.fixture
def most_blocks(monkeypatch) -> Callable[[], int]:
    """The largest number of blocks whose weights existed at once, since it was last asked."""
    take, drop = Block.take, Block.drop
    there: set[int] = set()
    most = [0]

    def taken(block: Block) -> None:
        take(block)
        there.add(id(block))
        most[0] = max(most[0], len(there))

    def dropped(block: Block) -> None:
        drop(block)
        there.discard(id(block))
        assert all(parameter.untyped_storage().nbytes() <= 4 for parameter in block.parameters)

    def asked() -> int:
        found, most[0] = most[0], 0
        return found

    monkeypatch.setattr(Block, "take", taken)
    monkeypatch.setattr(Block, "drop", dropped)
    return asked


def fitted(pool_file: Path, capfd: pytest.CaptureFixture[str], copy: str) -> Path:
    done = command(capfd, "fit", *fit_words(pool_file, f"--model.copy={copy}", "--name=n", f"--id={copy}"))
    assert done.code == 0, done.err[-3000:]
    return Path("runs/n") / copy


@pytest.mark.slow
def test_a_run_of_blocks_has_the_scores_of_the_whole_copy(pool_file, most_blocks, capfd):
    run = fitted(pool_file, capfd, "BlockCopy")
    assert isinstance(run_copy(run), BlockCopy) and most_blocks() == 1
    outcome = command(capfd, "test", run)
    assert outcome.code == 0, outcome.err[-3000:]
    assert most_blocks() == 1, "block by block"
    found = json.loads((run / "summary.json").read_text())["test"]["per_task"]
    whole = Path("runs/n/whole")
    shutil.copytree(run, whole)
    configuration = yaml.safe_load((whole / "config.yaml").read_text())
    configuration["model"]["copy"] = None
    write_yaml(whole / "config.yaml", configuration)
    scores, _ = score_run(whole, "test")
    assert isinstance(run_copy(whole), WholeCopy) and most_blocks() == 0
    assert found == scores and set(scores) == set(TASKS)


@pytest.mark.slow
def test_test_samples_that_were_calibrated_on_are_told(pool_file, capfd):
    """The pool's two splits hold the same nine rows; the papers' setting says so by itself."""
    run = fitted(pool_file, capfd, "WholeCopy")
    with pytest.warns(match="task 'one': 9 of 9 samples of the test split are calibration data too"):
        assert command(capfd, "test", run).code == 0
    assert json.loads((run / "summary.json").read_text())["test"]["calibrated_on"] == dict.fromkeys(TASKS, 9)
    configuration = yaml.safe_load((run / "config.yaml").read_text())
    configuration["data"]["init_args"]["transductive"] = True
    write_yaml(run / "config.yaml", configuration)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*calibration data too")
        assert command(capfd, "test", run).code == 0
    assert json.loads((run / "summary.json").read_text())["test"]["calibrated_on"] == {}


@pytest.mark.slow
def test_a_comparison_in_which_one_run_was_of_blocks(pool_file, most_blocks, capfd, monkeypatch):
    """The base, the experts and every method, in whatever order."""
    monkeypatch.setattr("adamerge.runs.compare.LAMBDAS", [0.0, 0.3])
    method = yaml.safe_load(LAYER_WISE.read_text())
    method["model"]["copy"] = {"class_path": "adamerge.blocks.BlockCopy"}
    blocks = write_yaml(Path("blocks.yaml"), method)
    first, words = METHODS / "task_arithmetic.yaml", [*QUICK, "--trainer.max_steps=2"]
    results = {}
    for folder, methods in (("one", [LAYER_WISE]), ("other", [blocks])):
        done = command(capfd, "compare", pool_file, first, *methods, "--folder", folder, *words)
        assert done.code == 0, done.err[-3000:]
        results[folder] = json.loads(Path(folder, "comparison.json").read_text())["methods"]
        assert most_blocks() == (folder == "other")
    for (name, row), other in zip(results["one"].items(), results["other"].values(), strict=True):
        assert row["per_task"] == pytest.approx(other["per_task"], rel=1e-5), name


def test_how_models_exist_that_one_process_scores():
    whole, blocks = WholeCopy(), BlockCopy()
    assert isinstance(copy_for_scores([whole, whole]), WholeCopy) and isinstance(copy_for_scores([]), WholeCopy)
    assert copy_for_scores([whole, blocks]) is blocks
    assert isinstance(copy_for_scores([ShardedCopy()]), BlockCopy)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="not a run's folder"):
        score_run(tmp_path, "test")


def test_verbs_take_a_run_or_a_file(pool_file, tmp_path, capfd):
    """A file is tested with the run it lies in, else with a pool that is named; export takes either."""
    method = METHODS / "task_arithmetic.yaml"
    assert command(capfd, "fit", *fit_words(pool_file, "--name=n", "--id=a", method=method)).code == 0
    run, file = Path("runs/n/a"), Path("runs/n/a/coefficients.safetensors")
    by_run = command(capfd, "test", run)
    summary = json.loads((run / "summary.json").read_text())
    assert by_run.code == 0 and summary["test"]["per_task"].keys() == TASKS.keys()
    del summary["test"]
    (run / "summary.json").write_text(json.dumps(summary))
    by_file = command(capfd, "test", file)
    assert (by_file.code, by_file.out) == (0, by_run.out)
    assert "test" in json.loads((run / "summary.json").read_text()), "the run's own"
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "mine.safetensors"
    moved.write_bytes(file.read_bytes())
    refused = command(capfd, "test", moved)
    assert refused.code == 2 and "mine.safetensors lies in no run's folder" in refused.error
    assert f"adamerge test {moved} --config POOL.yaml" in refused.err
    by_pool = command(capfd, "test", moved, "--config", pool_file)
    assert (by_pool.code, by_pool.out) == (0, by_run.out)
    assert [path.name for path in moved.parent.iterdir()] == ["mine.safetensors"]
    # a file beside a run's own is another's: its scores are not the run's
    before = (run / "summary.json").read_bytes()
    (run / "other.safetensors").write_bytes(file.read_bytes())
    assert command(capfd, "test", run / "other.safetensors").out == by_run.out
    assert (run / "summary.json").read_bytes() == before
    for number, what in enumerate((run, file)):
        assert command(capfd, "export", what, f"merged{number}").code == 0
    weights = [Path(f"merged{number}/model.safetensors").read_bytes() for number in range(2)]
    assert weights[0] == weights[1]
