"""The demo: what it chooses by, that a stranger's reload gives the trainer's logits, and all of it at three steps."""

import json
import sys

import pytest
import torch
from conftest import CLASSES
from running import ROOT, TASK_ARITHMETIC, child, pool_config, without_pictures, write_yaml
from safetensors.torch import load_file, save_file

from adamerge.artifacts.coefficients import load_coefficients
from adamerge.artifacts.export import export
from adamerge.backbones import OpenClipClassifier
from adamerge.runs.comparison_scores import REFERENCES
from adamerge.runs.fit import fit
from adamerge.testbed import demo
from adamerge.testbed.image_tasks import IMAGE_TASKS

METHODS = demo.settings()
ALL = {*REFERENCES, *METHODS}


def test_the_methods_and_the_pool_are_there(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert demo.POOL.is_file() and demo.RECIPE in METHODS
    assert all(demo.path_of(name).exists() for name in METHODS)
    assert {
        "pretrained", "individual", "task_arithmetic_0.3", "task_arithmetic_tuned", "adamerging_layer_wise",
        "expert_merging", "concrete_adamerging_layer_wise", "atlas_addition",
    } <= ALL  # fmt: skip


def test_what_is_given_goes_before_the_demos_settings():
    own = demo.settings(["--trainer.max_steps=3"])
    assert own["adamerging_layer_wise"].keys() == {"model.search.lr", "trainer.limit_val_batches"}
    assert "1.trainer.max_steps" not in own["concrete_adamerging_layer_wise"]
    assert demo.settings()["concrete_adamerging_layer_wise"]["1.trainer.max_steps"] == 20


def test_elsewhere_it_says_where_to_run_it_and_deletes_nothing(tmp_path, monkeypatch):
    kept = tmp_path / demo.FOLDER / "kept"
    kept.parent.mkdir(parents=True)
    kept.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo"])
    with pytest.raises(SystemExit, match=r"testbed_images\.yaml is not here"):
        demo.main()
    assert kept.is_file()


@pytest.fixture
def run(pool, image_folders, tmp_path, monkeypatch):
    """A run of task arithmetic on the tiny pool."""
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    pool_file = write_yaml(tmp_path / "tiny.yaml", pool_config(pool, image_folders))
    return fit(["--config", str(pool_file), "--config", str(TASK_ARITHMETIC), "--name=n", "--id=a"])


@pytest.fixture
def exported(run, tmp_path):
    return export(load_coefficients(run / "coefficients.safetensors"), tmp_path / "merged")


@pytest.mark.slow
def test_the_reload_needs_open_clip_alone_and_gives_its_logits(pool, exported, tmp_path):
    """In a process that may not import this package, against the same folder filled in by hand."""
    assert "adamerge" not in demo.RELOAD
    backbone = OpenClipClassifier(pool["base"])
    backbone.network.load_state_dict(load_file(exported / "open_clip_model.safetensors"))
    names, templates = CLASSES["shapes"], ["a photo of {}", "{}"]
    backbone.build_heads({"shapes": type("Words", (), {"classnames": names, "templates": templates})}, {})
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(256, (5, 3, 16, 16), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        expected = backbone.output(backbone.encode(inputs), "shapes").logits
    save_file({"images": backbone.normalise(inputs)}, tmp_path / "given.safetensors")
    code = "import sys\nsys.modules['adamerge'] = None\n" + demo.RELOAD
    words = [str(exported), "given.safetensors", json.dumps([names, templates]), "found.safetensors"]
    done = child(["-c", code, *words], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found = load_file(tmp_path / "found.safetensors")["logits"]
    assert found.shape == (5, len(names))
    assert torch.allclose(found, expected, atol=1e-5 * max(1.0, float(expected.abs().max())))


@pytest.fixture
def few(monkeypatch):
    """Few samples, and the reload in this process: another one takes seconds to load open_clip."""

    def here(command, check):
        assert command[:2] == [sys.executable, "-c"] and check
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["-c", *command[3:]])
            exec(command[2], {})

    monkeypatch.setattr(demo, "SAMPLES_COMPARED", 8)
    monkeypatch.setattr(demo.subprocess, "run", here)


def test_an_export_and_its_run_agree(run, exported, few):
    before = sorted(path.name for path in exported.parent.iterdir())
    difference, largest = demo._reload_elsewhere(run, exported)
    assert largest > 0 and difference <= 1e-5 * max(1.0, largest)
    assert sorted(path.name for path in exported.parent.iterdir()) == before, "what was compared is cleared away"


def test_an_export_that_is_not_the_runs_is_noticed(run, exported, few):
    weights = load_file(exported / "open_clip_model.safetensors")
    weights["visual.proj"] += 0.01
    save_file(weights, exported / "open_clip_model.safetensors")
    difference, largest = demo._reload_elsewhere(run, exported)
    assert difference > 1e-5 * max(1.0, largest)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_from_end_to_end(tmp_path):
    """At three steps a method; the whole of what ``make demo`` leaves behind."""
    for name in ("configs", "adamerge"):
        (tmp_path / name).symlink_to(ROOT / name)
    words = ["--trainer.max_steps=3", "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=1"]
    done = child(["-m", "adamerge.testbed.demo", *words], tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / demo.FOLDER
    result = json.loads((folder / "comparison.json").read_text())
    assert result.keys() >= {"tasks", "seconds", "export_max_abs_diff", "methods"}
    assert result["tasks"] == list(IMAGE_TASKS) and 0 < result["seconds"] < 900
    assert 0 <= result["export_max_abs_diff"] <= 1e-5 * max(1.0, result["export_max_abs_logit"])
    assert result["overrides"] == words
    methods = result["methods"]
    assert set(methods) == ALL
    tuned, ceiling = methods["task_arithmetic_tuned"]["average"], methods["individual"]["average"]
    assert ceiling > tuned > methods["pretrained"]["average"]
    for name, row in methods.items():
        assert row.keys() >= {"per_task", "average", "gap_closed", "labels"}
        assert list(row["per_task"]) == list(IMAGE_TASKS)
        assert all(0 <= score <= 1 for score in row["per_task"].values())
        assert row["average"] == pytest.approx(sum(row["per_task"].values()) / len(IMAGE_TASKS))
        assert row["gap_closed"] == pytest.approx((row["average"] - tuned) / (ceiling - tuned))
        assert row["labels"] is (name in {"task_arithmetic_tuned", "atlas_addition"})
        assert name in done.stdout
    assert methods["task_arithmetic_tuned"]["gap_closed"] == 0 and methods["individual"]["gap_closed"] == 1
    assert result["runs"].keys() == set(METHODS) and result["exported"] == demo.RECIPE
    assert {path.name for path in (folder / "merged").iterdir()} >= {"open_clip_model.safetensors", "README.md"}
    written = {f"comparison.{kind}" for kind in ("json", "csv", "md", "tex", "png")}
    assert {path.name for path in folder.iterdir()} == {"fits", "scores", "merged", *written}
    assert (tmp_path / result["runs"][result["exported"]] / "heatmap.png").stat().st_size > 2000
