"""Comparison: one table of several methods, from fits that are kept, resumed and never repeated."""

import json
import math
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from conftest import CLASSES
from running import METHODS, QUICK, TASK_ARITHMETIC, command, pool_config, without_pictures, write_yaml

from adamerge.parametrizations import TaskWise
from adamerge.runs.compare import LAMBDAS, compare
from adamerge.runs.comparison_scores import REFERENCES
from adamerge.runs.instantiate import Configured
from adamerge.training.evaluation import gap_closed
from adamerge.training.scorer import Scorer

TASK_WISE = METHODS / "adamerging_task_wise.yaml"
OVERRIDES = (*QUICK, "--trainer.max_steps=3", "--model.search.lr=0.05")


@pytest.fixture
def pool_file(pool, image_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    without_pictures(monkeypatch)
    return write_yaml(tmp_path / "pools" / "tiny.yaml", pool_config(pool, image_folders))


@pytest.fixture
def few_lambdas(monkeypatch):
    """Nine fewer merges than the whole grid needs."""
    monkeypatch.setattr("adamerge.runs.compare.LAMBDAS", [0.0, 0.3, 1.0])


def test_the_grid():
    assert [n / 20 for n in range(21)] == LAMBDAS


def test_the_oracle_may_choose_from_fewer(pool_file, capfd):
    words = [pool_file, TASK_ARITHMETIC, "--folder", "table"]
    assert command(capfd, "compare", *words, "--lambdas", "0.5", *OVERRIDES).code == 0
    result = json.loads(Path("table/comparison.json").read_text())
    assert result["lambdas"] == [0.3, 0.5] and result["tuned_lambda"] in (0.3, 0.5)
    outcome = command(capfd, "compare", *words, "--lambdas", "nan", *OVERRIDES)
    assert outcome.code == 2 and "lambdas must be finite" in outcome.error


def test_from_end_to_end(pool_file, few_lambdas, capfd):
    words = [pool_file, TASK_ARITHMETIC, TASK_WISE, "--folder", "table"]
    outcome = command(capfd, "compare", *words, *OVERRIDES)
    assert outcome.code == 0, outcome.err[-2000:]
    result = json.loads(Path("table/comparison.json").read_text())
    assert result["tasks"] == list(CLASSES) and (result["skipped_rows"], result["warnings"]) == ({}, [])
    assert set(result["methods"]) == {*REFERENCES, "task_arithmetic", "adamerging_task_wise"}
    for name, row in result["methods"].items():
        assert row.keys() >= {"per_task", "average", "gap_closed", "labels"}
        assert list(row["per_task"]) == list(CLASSES)
        assert row["average"] == pytest.approx(sum(row["per_task"].values()) / 2)
        assert row["labels"] is (name == "task_arithmetic_tuned")
        assert name in outcome.out
    methods = result["methods"]
    assert methods["task_arithmetic"]["per_task"] == methods["task_arithmetic_0.3"]["per_task"]
    tuned, ceiling = methods["task_arithmetic_tuned"]["average"], methods["individual"]["average"]
    for row in methods.values():
        if ceiling == tuned:
            assert row["gap_closed"] is None
        else:
            assert row["gap_closed"] == pytest.approx((row["average"] - tuned) / (ceiling - tuned))
    assert tuned >= max(methods["pretrained"]["average"], methods["task_arithmetic_0.3"]["average"])
    assert methods["task_arithmetic_tuned"]["to_oracle"] == [0, 0]
    assert "gap closed" in outcome.out and "labels" in outcome.out

    kept = {path: path.stat().st_mtime_ns for path in Path("table/fits").rglob("*") if path.is_file()}
    again = compare(pool_file, [TASK_ARITHMETIC, TASK_WISE], Path("table"), OVERRIDES)
    assert {path: path.stat().st_mtime_ns for path in Path("table/fits").rglob("*") if path.is_file()} == kept
    assert (
        json.loads(json.dumps(again["methods"]["adamerging_task_wise"]["per_task"]))
        == (methods["adamerging_task_wise"]["per_task"])
    )


def test_gap_closed_by_hand():
    assert gap_closed(0.7, 0.6, 0.8) == pytest.approx(0.5)
    assert gap_closed(0.6, 0.6, 0.8) == 0 and gap_closed(0.8, 0.6, 0.8) == 1
    assert gap_closed(0.5, 0.6, 0.8) == pytest.approx(-0.5)
    assert math.isnan(gap_closed(0.5, 0.6, 0.6))


def test_the_scores_are_those_of_a_loop_by_hand(pool_file, pool):
    """Base, experts and task arithmetic, each with a network loaded by open_clip alone."""
    import open_clip
    from safetensors.torch import load_file

    cli = Configured.of(["--config", str(pool_file), "--config", str(TASK_ARITHMETIC)])
    vectors = cli.model.merged.task_vectors
    scorer = Scorer(cli.model.merged.backbone, cli.datamodule, vectors, "test")
    found = {
        "base": scorer.base(),
        "expert": scorer.experts(),
        "merged": scorer.merged(vectors, lambda v: TaskWise(v, init=0.3)),
    }
    assert found["base"].keys() == CLASSES.keys() == found["expert"].keys()
    network = open_clip.create_model(f"local-dir:{pool['base']}").eval()
    base = {name: value.clone() for name, value in network.state_dict().items()}
    experts = {task: load_file(path) for task, path in pool["experts"].items()}
    summed = {
        name: value + 0.3 * sum(expert[name] - value for expert in experts.values())
        for name, value in base.items()
        if name.startswith("visual.")
    }
    backbone = scorer.backbone
    for task in CLASSES:
        weights = {"base": {}, "expert": experts[task], "merged": summed}
        for who, state in weights.items():
            network.load_state_dict({**base, **state})
            hits = []
            with torch.no_grad():
                for batch in cli.datamodule.eval_dataloader(task, "test"):
                    images = (batch.inputs / 255 - backbone._mean) / backbone._std
                    logits = network.encode_image(images, normalize=True) @ backbone.heads[task].weight.T
                    hits.append((logits.argmax(-1) == batch.labels).float())
            assert torch.equal(torch.cat(hits), found[who][task]), (who, task)


def run_in(folder: str) -> Path:
    """The one fit in a comparison's folder."""
    (run,) = (Path(folder) / "fits").iterdir()
    return run


@pytest.mark.slow
@pytest.mark.parametrize("left", ["a checkpoint and a summary", "the configuration alone"])
def test_a_killed_fit_is_gone_on_with(left, pool_file, few_lambdas, capfd):
    assert command(capfd, "compare", pool_file, TASK_WISE, "--folder", "whole", *OVERRIDES).code == 0
    assert command(capfd, "compare", pool_file, TASK_WISE, "--folder", "torn", *OVERRIDES).code == 0
    run = run_in("torn")
    (run / "coefficients.safetensors").unlink()
    (run / "checkpoints/last.ckpt").unlink()
    (run / "checkpoints/step=3.ckpt").unlink()
    if left == "the configuration alone":
        for path in (run / "summary.json", run / "environment.json", *(run / "checkpoints").iterdir()):
            path.unlink()
    else:
        (run / "summary.json").write_text(json.dumps({"status": "running", "step": 0}))
    outcome = command(capfd, "compare", pool_file, TASK_WISE, "--folder", "torn", *OVERRIDES)
    assert outcome.code == 0, outcome.err[-2000:]
    assert run_in("torn") == run, "no second run was made"
    one, other = ((run_in(folder) / "coefficients.safetensors").read_bytes() for folder in ("whole", "torn"))
    assert one == other


@pytest.mark.slow
def test_a_finished_fit_of_another_configuration_is_not_passed_off_as_this_one(pool_file, few_lambdas, capfd):
    words = ["compare", pool_file, TASK_WISE, "--folder", "table", *QUICK, "--trainer.max_steps=3"]
    for lr in ("0.001", "0.2"):
        assert command(capfd, *words, f"--model.search.lr={lr}").code == 0
        run = Path(json.loads(Path("table/comparison.json").read_text())["runs"]["adamerging_task_wise"])
        assert f"lr: {lr}" in (run / "config.yaml").read_text()


def test_faults_are_told_before_anything_is_fitted(pool_file, capfd):
    outcome = command(capfd, "compare", pool_file, TASK_WISE, "gone.yaml", "--folder", "table", *OVERRIDES)
    assert outcome.code == 2 and "gone.yaml" in outcome.error
    assert not Path("table").exists()
    outcome = command(capfd, "compare", "gone_pool.yaml", TASK_WISE, "--folder", "table")
    assert outcome.code == 2 and "gone_pool.yaml" in outcome.error and not Path("table").exists()


def fault_of_objective(content, tmp_path):
    content["model"]["objective"] = {"class_path": "adamerge.CrossEntropy"}
    return content, "CrossEntropy needs labels"


def fault_of_key(content, tmp_path):
    content["model"]["rl"] = 0.1
    return content, "rl"


def fault_of_length(content, tmp_path):
    content["trainer"]["limit_train_batches"] = 2
    return content, "limit_train_batches=2"


@pytest.mark.parametrize("stages", [False, True])
@pytest.mark.parametrize("damage", [fault_of_objective, fault_of_key, fault_of_length], ids=lambda f: f.__name__)
def test_a_wrong_second_method_is_refused_before_the_first_is_fitted(damage, stages, pool_file, tmp_path, capfd):
    good = yaml.safe_load(TASK_WISE.read_text())
    bad, named = damage(yaml.safe_load(TASK_WISE.read_text()), tmp_path)
    method = write_yaml(tmp_path / "mine" / "wrong.yaml", bad)
    if stages:
        write_yaml(tmp_path / "wrong" / "1_right.yaml", good)
        method = write_yaml(tmp_path / "wrong" / "2_wrong.yaml", bad).parent
    outcome = command(capfd, "compare", pool_file, TASK_WISE, method, "--folder", "table", *OVERRIDES)
    assert outcome.code == 2 and named in outcome.error and "wrong" in outcome.error, outcome.err[-2000:]
    assert not Path("table").exists() and not Path("runs").exists()


@pytest.mark.parametrize("lacks", ["the split", "its labels"])
def test_a_pool_that_cannot_be_scored_is_refused_before_anything_is_fitted(lacks, pool_file, tmp_path, capfd):
    content = yaml.safe_load(pool_file.read_text())
    task = next(iter(CLASSES))
    spec = content["data"]["init_args"]["tasks"][task]
    splits = datasets.load_from_disk(spec["dataset"])
    if lacks == "the split":
        spec["classnames"] = CLASSES[task]
        splits = datasets.DatasetDict({"calibration": splits["train"], "validation": splits["train"]})
    else:
        splits["test"] = splits["test"].map(lambda row: {"label": -1}, features=splits["test"].features.copy())
    splits.save_to_disk(tmp_path / "without")
    spec["dataset"] = str(tmp_path / "without")
    file = write_yaml(tmp_path / "pools" / "without.yaml", content)
    outcome = command(capfd, "compare", file, TASK_WISE, TASK_ARITHMETIC, "--folder", "table", *OVERRIDES)
    assert outcome.code == 3 and f"task '{task}'" in outcome.error and "test split" in outcome.error, outcome.err[
        -2000:
    ]
    assert not Path("table").exists()


def test_two_methods_of_one_name_are_refused(pool_file, tmp_path, capfd):
    other = tmp_path / "mine" / TASK_WISE.name
    other.parent.mkdir()
    other.write_text(TASK_ARITHMETIC.read_text())
    outcome = command(capfd, "compare", pool_file, TASK_WISE, other, "--folder", "table", *OVERRIDES)
    assert outcome.code == 2 and "adamerging_task_wise" in outcome.error


def comparison(folder: str, split: str = "") -> dict:
    return json.loads((Path(folder) / f"comparison{split}.json").read_text())


def test_seeds_and_a_finished_run_in_one_table_and_nothing_is_repeated(pool_file, monkeypatch, capfd):
    words = ["--lambdas", "0.3", "--folder", "table", "--seeds", "0,1", *OVERRIDES, "--model.search.lr=0.3"]
    assert command(capfd, "fit", pool_file, TASK_WISE, "--name=n", "--id=mine", *OVERRIDES).code == 0
    line = ["compare", pool_file, TASK_WISE, "runs/n/mine", *words]
    outcome = command(capfd, *line)
    assert outcome.code == 0, outcome.err[-2000:]
    result = comparison("table")
    row, mine = (result["methods"][name] for name in ("adamerging_task_wise", "n/mine"))
    averages = [row["seeds"][seed]["average"] for seed in ("0", "1")]
    assert row["average"] == pytest.approx(sum(averages) / 2)
    assert row["spread"]["average"] == pytest.approx(abs(averages[0] - averages[1]) / math.sqrt(2))
    assert row["section"] == mine["section"] == "unlabelled" and mine["spread"]["average"] is None
    assert row["costs"]["steps"] == 3 and row["costs"]["merged_passes"] == (3 + 3) * 2 * 4, "and three looks before"
    assert row["costs"]["learned"] == 2 and row["class"] == "few"
    assert mine["settings"][0]["max_steps"] == 3 and result["runs"]["n/mine"] == "runs/n/mine"
    seeds = [yaml.safe_load((Path(row["seeds"][seed]["run"]) / "config.yaml").read_text()) for seed in ("0", "1")]
    assert [(one["data"]["init_args"]["seed"], one["seed_everything"]) for one in seeds] == [(0, 0), (1, 1)]
    assert [one["data"]["init_args"]["splits_seed"] for one in seeds] == [0, 0], (
        "both are scored on what neither has seen"
    )
    for ending in ("csv", "md", "tex", "png"):
        assert Path(f"table/comparison.{ending}").stat().st_size > 100

    def not_again(*given, **more):
        raise AssertionError("it has been done")

    monkeypatch.setattr("adamerge.runs.comparison_fits.fit_stages", not_again)
    monkeypatch.setattr(Scorer, "_score", not_again)
    before = Path("table/comparison.json").read_bytes()
    assert command(capfd, *line).code == 0 and Path("table/comparison.json").read_bytes() == before
    next(iter(Path("table/scores").iterdir())).unlink()
    with pytest.raises(AssertionError, match="it has been done"):
        command(capfd, *line)


@pytest.mark.slow
def test_a_grid_on_validation_under_corruption_with_a_task_left_out(pool_file, few_lambdas, capfd):
    left = list(CLASSES)[1]
    grid = ["--grid", "adamerging_task_wise:model.search.lr=0.01,0.1", "--split", "validation", "--forward-passes", "8"]
    words = ["--folder", "table", *grid, "--corruptions", "--leave-out", left, *OVERRIDES]
    outcome = command(capfd, "compare", pool_file, TASK_ARITHMETIC, TASK_WISE, *words)
    assert outcome.code == 0, outcome.err[-2000:]
    result = comparison("table", "_validation")
    names = [f"adamerging_task_wise lr={rate}" for rate in ("0.01", "0.1")]
    assert set(result["methods"]) == {*REFERENCES, "task_arithmetic", *names}
    for name in names:
        row = result["methods"][name]
        assert row["costs"]["steps"] == 2, "8 passes of one task in batches of 4"
        assert row["costs"]["learned"] == 1 and list(row["per_task"]) == list(CLASSES)
        assert set(row["corrupted"]) == {"noise", "blur", "contrast", "JPEG", "average"}
    arithmetic = result["methods"]["task_arithmetic"]
    assert arithmetic["per_task"] == result["methods"]["task_arithmetic_0.3"]["per_task"], "nor does it have the expert"
    assert arithmetic["section"] == "no data"
    assert (result["split"], result["leave_out"], result["forward_passes"]) == ("validation", [left], 8)
    assert not Path("table/comparison.json").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--grid", "lr"], "--grid lr"),
        (["--leave-out", "gone"], "no task 'gone'"),
        (["--forward-passes", "1"], "--forward-passes 1"),
        (["--seeds", "a"], "--seeds"),
    ],
)
def test_what_cannot_be_asked_for(words, named, pool_file, capfd):
    outcome = command(capfd, "compare", pool_file, TASK_WISE, "--folder", "table", *words, *OVERRIDES)
    assert outcome.code == 2 and named in outcome.err and not Path("table").exists()


def test_pictures_go_through_a_change_before_the_networks_own(pool_file):
    fit = Configured.of(["--config", str(pool_file), "--config", str(TASK_ARITHMETIC)])
    data, task = fit.datamodule, next(iter(CLASSES))
    data.serve(fit.model.merged.backbone)
    plain = data.samples(task, "test")[0]
    black = data.changed(lambda picture: picture.point(lambda value: 0)).samples(task, "test")[0]
    assert black.shape == plain.shape and int(black.max()) == 0 < int(plain.max())
    assert torch.equal(data.samples(task, "test")[0], plain), "the data themselves are as they were"
