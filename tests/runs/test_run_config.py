"""A run's configuration: whole or not there, and read from another working directory it means the same files."""

import errno
import os
from pathlib import Path

import pytest
import yaml
from running import TASK_ARITHMETIC, command, fit_words, pool_config, same_coefficients, without_pictures, write_yaml

from adamerge.checkpoints.opening import lasting_path
from adamerge.runs.parser import as_data, read_first
from adamerge.runs.run_config import located, write_config


@pytest.fixture
def relative(pool, image_folders, tmp_path, monkeypatch):
    """The tiny pool by paths that are relative to the working directory."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    without_pictures(monkeypatch)
    near = lambda path: os.path.relpath(path, home)  # noqa: E731
    config = pool_config(pool, {task: near(folder) for task, folder in image_folders.items()})
    vectors = config["model"]["task_vectors"]
    vectors["base"] = config["model"]["backbone"]["init_args"]["architecture"] = near(vectors["base"])
    vectors["experts"] = {task: near(path) for task, path in vectors["experts"].items()}
    return write_yaml(home / "pools" / "tiny.yaml", config)


@pytest.mark.slow
def test_a_run_is_tested_resumed_and_exported_from_another_directory(relative, tmp_path, monkeypatch, capfd):
    first = command(capfd, "fit", *fit_words(relative, "--name=n", "--id=a", steps=2))
    assert first.code == 0, first.err[-2000:]
    start = "--model.init_from=runs/n/a/coefficients.safetensors"
    assert command(capfd, "fit", *fit_words(relative, start, "--name=n", "--id=b", steps=2)).code == 0
    run = Path("runs/n/b").absolute()
    config = yaml.safe_load((run / "config.yaml").read_text())
    named = [config["model"]["init_from"], *config["model"]["task_vectors"]["init_args"]["experts"].values()]
    assert all(Path(place).is_absolute() and ".." not in place for place in named)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for words in (("test", run), ("fit", "--resume", run), ("export", run / "coefficients.safetensors", "merged")):
        outcome = command(capfd, *words)
        assert outcome.code == 0, (words, outcome.err[-2000:])


def test_out_of_disk_when_the_configuration_is_written_leaves_a_folder_that_can_be_used(relative, monkeypatch, capfd):
    """As a kill at that moment: what is there of the file has another name."""
    plain = os.replace

    def full(source, target):
        if Path(target).name == "config.yaml":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return plain(source, target)

    words = fit_words(relative, "--name=n", "--id=a", method=TASK_ARITHMETIC)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        outcome = command(capfd, "fit", *words)
    run = Path("runs/n/a")
    assert outcome.code == 5 and "config.yaml" in outcome.error and "No space left" in outcome.error
    assert not (run / "config.yaml").exists() and not (run / "summary.json").exists()
    (run / ".config.yaml.adamerge-999999-abcdef-01234567.tmp").write_text("model: {tor")
    assert command(capfd, "fit", *words).code == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["task_vectors"]
    again = command(capfd, "fit", "--config", run / "config.yaml", "--name=n", "--id=b")
    assert again.code == 0 and same_coefficients(run, Path("runs/n/b"))


def test_what_is_made_absolute_and_what_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "base").mkdir(parents=True)
    here = str(tmp_path)
    config = {
        "model": {
            "backbone": {"class_path": "adamerge.CausalLM", "init_args": {"model": "models/base"}},
            "task_vectors": {
                "class_path": "adamerge.TaskVectors",
                "init_args": {
                    "base": "./models/../models/base",
                    "experts": {"a.b": "models/base", "hub": "org/name@main", "pair": "models/base+org/adapter"},
                    "include": ["models/base"],
                },
            },
            "parametrization": {"init_args": {"inner": {"init_args": {"importance": "i.json"}}, "mask_from": "m"}},
            "teachers": {"init_args": {"folder": "teachers"}},
            "init_from": None,
        },
        "data": {
            "init_args": {"tasks": {"t": {"dataset": "models", "images": "pictures"}, "h": {"dataset": "org/set"}}}
        },
        "name": "models",
    }
    found = located(config)
    vectors = found["model"]["task_vectors"]["init_args"]
    assert vectors["base"] == found["model"]["backbone"]["init_args"]["model"] == f"{here}/models/base"
    assert vectors["experts"] == {
        "a.b": f"{here}/models/base", "hub": "org/name@main", "pair": f"{here}/models/base+org/adapter",
    }  # fmt: skip
    assert vectors["include"] == ["models/base"] and found["name"] == "models" and found["model"]["init_from"] is None
    made = found["model"]["parametrization"]["init_args"]
    assert (made["mask_from"], made["inner"]["init_args"]["importance"]) == (f"{here}/m", f"{here}/i.json")
    assert found["model"]["teachers"]["init_args"]["folder"] == f"{here}/teachers"
    assert found["data"]["init_args"]["tasks"] == {
        "t": {"dataset": f"{here}/models", "images": f"{here}/pictures"}, "h": {"dataset": "org/set"},
    }  # fmt: skip


def test_what_lies_inside_the_run_is_found_where_the_run_is_now(relative, tmp_path, monkeypatch):
    """Whichever key it has: one of a user's class holds a path too."""
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    inside = (f"--model.init_from={run}/1/x.safetensors", f"--trainer.default_root_dir={run}", f"--runs={run}s")
    settings = read_first(fit_words(relative, *inside))
    write_config(settings, run / "config.yaml")
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["model"]["init_from"] == "{this_run}/1/x.safetensors" and written["runs"] == f"{run}s"
    assert written["trainer"]["default_root_dir"] == "{this_run}"
    base = written["model"]["task_vectors"]["init_args"]["base"]
    assert Path(base).is_absolute() and Path(base).is_dir(), "what lies elsewhere stays there"
    run.rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path / "b")
    found = as_data(read_first(["config.yaml"]))
    assert found["model"]["init_from"] == f"{tmp_path}/b/1/x.safetensors" and found["runs"] == f"{run}s"
    assert found["trainer"]["default_root_dir"] == f"{tmp_path}/b"


def test_a_place_behind_a_link_stays_the_same_place(tmp_path, monkeypatch):
    """``link/..`` is where the link leads to, not where it lies."""
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "far" / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "deep")
    monkeypatch.chdir(tmp_path)
    assert os.path.samefile(lasting_path("link/../base"), tmp_path / "far" / "base")
    assert (
        lasting_path("package:adamerge/testbed") == "package:adamerge/testbed"
        and lasting_path("ViT-B-32") == "ViT-B-32"
    )
