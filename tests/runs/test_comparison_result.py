"""Result of a comparison: every statistic against one that is worked out by hand from planted scores."""

import json
import math

import pytest
import torch

from adamerge.data.metrics import Accuracy, TokenLoss
from adamerge.runs.comparison_result import SMALL, result_of
from adamerge.runs.comparison_scores import REFERENCES, Scored

TASKS = ["a", "b"]


def scores(a, b):
    return {"a": torch.tensor(a), "b": torch.tensor(b)}


def run_at(tmp_path, name, **summary):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.yaml").write_text("model: {parametrization: {class_path: adamerge.TaskWise}}\n")
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def planted(tmp_path):
    references = {
        "pretrained": scores([0.0, 0, 0, 0], [0.0, 0]),
        "individual": scores([1.0, 1, 1, 1], [1.0, 1]),
        "task_arithmetic_0.3": scores([0.0, 0, 0, 1], [0.0, 0]),
        "task_arithmetic_tuned": scores([0.0, 0, 1, 1], [0.0, 1]),
    }
    runs = {"mine": {"0": scores([1.0, 1, 1, 1], [0.0, 1]), "1": scores([0.0, 1, 1, 1], [0.0, 0])}}
    took = {"seconds": 4.0, "step": 3, "forward_passes": {"merged": 12, "experts": 6}, "peak_host_bytes": 100}
    folders = {
        seed: run_at(
            tmp_path,
            f"run{seed}",
            **took | {"seconds": 2.0 + 4 * int(seed)},
            learned={"scalars": 5, "of": 1000},
            protocol={"calibration_split": "calibration, labels never read", "labelled": False},
        )
        for seed in ("0", "1")
    }
    return Scored(references, runs), {"mine": folders}


def test_means_spreads_and_differences_by_hand(planted):
    scored, runs = planted
    row = result_of(scored, {}, runs, TASKS, Accuracy())["methods"]["mine"]
    assert row["per_task"] == {"a": (1 + 0.75) / 2, "b": (0.5 + 0) / 2}
    assert row["average"] == pytest.approx((0.875 + 0.25) / 2)
    assert [row["seeds"][seed]["average"] for seed in "01"] == [0.75, 0.375]
    assert row["spread"]["average"] == pytest.approx(abs(0.75 - 0.375) / math.sqrt(2))
    assert row["spread"]["per_task"] == {
        "a": pytest.approx(0.25 / math.sqrt(2)),
        "b": pytest.approx(0.5 / math.sqrt(2)),
    }
    # of the seeds' mean scores: a (.5, 1, 1, 1) - (0, 0, 1, 1) = (.5, 1, 0, 0); b (0, .5) - (0, 1) = (0, -.5)
    variance = (sum((x - 0.375) ** 2 for x in (0.5, 1, 0, 0)) / 3 / 4 + sum((x + 0.25) ** 2 for x in (0, -0.5)) / 2) / 4
    assert row["to_oracle"] == (pytest.approx((0.375 - 0.25) / 2), pytest.approx(math.sqrt(variance)))
    assert row["worst_task"] == ["b", pytest.approx(-0.25), pytest.approx(0.25)]
    assert row["gap_closed"] == pytest.approx((0.5625 - 0.5) / (1 - 0.5))


def test_costs_are_means_over_seeds_and_the_class_follows_from_the_share(planted):
    scored, runs = planted
    row = result_of(scored, {}, runs, TASKS, Accuracy())["methods"]["mine"]
    assert row["section"] == "unlabelled" and row["labels"] is False and row["class"] == "few"
    assert row["costs"] == {
        "seconds": 4.0, "steps": 3, "merged_passes": 12, "teacher_passes": 6, "peak_bytes": 100, "learned": 5, "share": 0.005,
    }  # fmt: skip
    assert row["costs"]["share"] <= SMALL
    for folder in runs["mine"].values():
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | {"learned": {"scalars": 11, "of": 1000}}))
    assert result_of(scored, {}, runs, TASKS, Accuracy())["methods"]["mine"]["class"] == "many"


def test_references_and_a_single_seed_have_no_spread(planted):
    methods = result_of(planted[0], {}, planted[1], TASKS, Accuracy())["methods"]
    for name in REFERENCES:
        assert methods[name]["spread"]["average"] is None and methods[name]["section"] == "reference"
    assert [name for name in methods if methods[name]["labels"]] == ["task_arithmetic_tuned"]


def test_where_less_is_better_the_worst_task_is_the_one_that_grew(planted):
    row = result_of(planted[0], {}, planted[1], TASKS, TokenLoss())["methods"]["mine"]
    assert row["worst_task"][:2] == ["a", pytest.approx(0.375)]


def test_corrupted_averages_and_their_mean(planted):
    scored, runs = planted
    half = Scored(
        {name: {task: own / 2 for task, own in one.items()} for name, one in scored.references.items()},
        {"mine": {seed: {task: own / 2 for task, own in one.items()} for seed, one in scored.runs["mine"].items()}},
    )
    none = Scored(
        {name: {task: own * 0 for task, own in one.items()} for name, one in scored.references.items()},
        {"mine": {seed: {task: own * 0 for task, own in one.items()} for seed, one in scored.runs["mine"].items()}},
    )
    rows = result_of(scored, {"noise": half, "blur": none}, runs, TASKS, Accuracy())["methods"]
    assert rows["mine"]["corrupted"] == {"noise": pytest.approx(0.28125), "blur": 0, "average": pytest.approx(0.140625)}
    assert rows["individual"]["corrupted"]["noise"] == 0.5
