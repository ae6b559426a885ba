"""Finished runs: what their summaries say over all stages, and that those of other models are refused."""

import json

import pytest
from running import METHODS, TASK_ARITHMETIC, fit_words, pool_config, without_pictures, write_yaml
from safetensors.torch import load_file, save_file

from adamerge.errors import ConfigError
from adamerge.io.coefficient_file import read_coefficients
from adamerge.runs.finished_runs import check_models, costs_of, names_of, section_of, seen_too, settings_of
from adamerge.runs.fit import fit
from adamerge.runs.instantiate import Configured
from adamerge.runs.stages import fit as fit_stages
from adamerge.task_vectors.task_vectors import TaskVectors

SEEN = {"calibration_split": "calibration, labels never read", "labelled": False}


def summarised(folder, **content):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("protocols", "section"),
    [
        ([{}], "no data"),
        ([None], "no data"),
        ([{"held": 3}], "no data"),
        ([SEEN], "unlabelled"),
        ([{"recalibrated_buffers": "2 running statistics"}], "unlabelled"),
        ([SEEN, {}], "unlabelled"),
        ([SEEN | {"labelled": True}, SEEN], "labelled"),
        ([SEEN | {"selection": {"step": 3}}], "labelled"),
    ],
)
def test_what_any_stage_has_seen_counts(protocols, section, tmp_path):
    stages = {f"{i}_s": {"protocol": protocol} for i, protocol in enumerate(protocols, 1)}
    run = summarised(tmp_path / "run", **({"stages": stages} if len(stages) > 1 else {"protocol": protocols[0]}))
    assert section_of(run) == section


def test_costs_of_stages_are_added_and_the_peak_is_the_largest(tmp_path):
    one = {
        "seconds": 2.0, "step": 10, "forward_passes": {"merged": 80, "experts": 7, "validation": 9}, "peak_host_bytes": 5,
        "learned": {"scalars": 4, "of": 100},
    }  # fmt: skip
    two = {**one, "seconds": 0.5, "step": 0, "peak_host_bytes": 9, "learned": {"scalars": 1, "of": 100}}
    run = summarised(tmp_path / "run", stages={"1_a": one, "2_b": two})
    assert costs_of(run) == {
        "seconds": 2.5, "steps": 10, "merged_passes": 160, "teacher_passes": 14, "peak_bytes": 9, "learned": 5, "share": 0.05,
    }  # fmt: skip


def test_what_an_earlier_version_did_not_write_is_not_known(tmp_path):
    run = summarised(tmp_path / "run", status="finished", step=3)
    assert costs_of(run) == {"steps": 3} | dict.fromkeys(
        ["seconds", "merged_passes", "teacher_passes", "peak_bytes", "learned", "share"]
    )


@pytest.fixture
def place(pool, image_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    return write_yaml(tmp_path / "pools" / "tiny.yaml", pool_config(pool, image_folders))


def test_a_run_says_its_settings_and_which_scored_samples_it_has_seen(place):
    run = fit(fit_words(place, "--name=n", "--id=a", steps=2))
    (settings,) = settings_of(run)
    assert settings["objective"] == "Entropy(normalise=False)" and settings["search"].startswith("Descent(lr=")
    assert (settings["max_steps"], settings["batch_size"]) == (2, 4)
    data = Configured.of(["--config", str(place), "--config", str(TASK_ARITHMETIC)]).datamodule
    assert seen_too(run, data, "test") == {}
    other = Configured.of(["--config", str(place), "--config", str(TASK_ARITHMETIC), "--data.seed=1"]).datamodule
    pixels = [
        {task: {row["image"].tobytes() for row in one.rows(task, split)} for task in one.tasks}
        for one, split in ((data, "calibration"), (other, "validation"))
    ]  # drawn anew from the same rows
    shared = {task: len(own & pixels[1][task]) for task, own in pixels[0].items()}
    assert any(shared.values()), "else choose another seed: the test would show nothing"
    assert seen_too(run, other, "validation") == {task: count for task, count in shared.items() if count}


def test_runs_of_other_models_are_refused(place, pool, tmp_path):
    run = fit(fit_words(place, "--name=n", "--id=a", method=TASK_ARITHMETIC))
    vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"])
    check_models(run, vectors)
    first = next(iter(pool["experts"]))
    moved = {name: value + 1 for name, value in load_file(pool["experts"][first]).items()}
    save_file(moved, tmp_path / "moved.safetensors")
    others = pool["experts"] | {first: str(tmp_path / "moved.safetensors")}
    with pytest.raises(ConfigError, match=f"expert '{first}' is not the pool's"):
        check_models(run, TaskVectors(pool["base"], others, include=pool["include"]))
    fewer = {task: path for task, path in pool["experts"].items() if task != first}
    with pytest.raises(ConfigError, match=f"expert '{first}' is not the pool's"):
        check_models(run, TaskVectors(pool["base"], fewer, include=pool["include"]))
    (run / "summary.json").write_text(json.dumps({"status": "diverged"}))
    with pytest.raises(ConfigError, match="diverged"):
        check_models(run, vectors)


@pytest.mark.slow
def test_a_vector_that_a_run_has_solved_for_itself_is_no_other_model(place, pool):
    run = fit_stages(fit_words(place, "--name=n", "--id=a", method=METHODS / "wudi_strength"))
    vectors = TaskVectors(pool["base"], pool["experts"], include=pool["include"])
    assert len(read_coefficients(run / "coefficients.safetensors")[0]["experts"]) == len(pool["experts"]) + 1
    check_models(run, vectors)
    fewer = dict(list(pool["experts"].items())[1:])
    with pytest.raises(ConfigError, match=f"expert '{next(iter(pool['experts']))}' is not the pool's"):
        check_models(run, TaskVectors(pool["base"], fewer, include=pool["include"]))
    first = next(iter(fewer))
    more = {name: value + 1 for name, value in load_file(fewer[first]).items()}
    save_file(more, "foreign.safetensors")
    words = fit_words(place, "--name=n", "--id=b", method=METHODS / "wudi_strength")
    foreign = fit_stages([*words, "--1.model.task_vectors.experts.foreign=foreign.safetensors"])
    with pytest.raises(ConfigError, match="expert 'foreign' is not the pool's"):
        check_models(foreign, vectors)


def test_names_are_the_ends_of_paths(tmp_path):
    one, two = tmp_path / "x" / "n" / "a", tmp_path / "y" / "n" / "a"
    assert names_of([one]) == {"n/a": one}
    with pytest.raises(ConfigError, match="same name"):
        names_of([one, two])
