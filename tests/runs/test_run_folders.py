"""Run folders: one run in each, one process group at a time, whoever was quicker."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from running import LAYER_WISE, QUICK, command, pool_config, without_pictures, write_yaml

from adamerge.errors import ConfigError
from adamerge.runs.run_folders import (
    last_checkpoint,
    locked,
    refuse_ended,
    refuse_used,
    run_folder,
    started,
    summary_of,
)
from adamerge.training import MergingModule


def test_a_folder_is_free_until_a_configuration_or_stages_are_in_it(tmp_path):
    folder = tmp_path / "runs" / "n" / "a"
    with locked(folder):
        assert (folder / ".holder").is_file() and not started(folder)
        with pytest.raises(ConfigError, match="is in use by process"), locked(folder):
            raise AssertionError
    refuse_used(folder)
    for name in ("config.yaml", "stages.json"):
        (folder / name).write_text("")
        with pytest.raises(ConfigError, match="holds a run already"):
            refuse_used(folder)
        (folder / name).unlink()
    with pytest.raises(ConfigError, match="not a run's folder"):
        refuse_ended(folder)
    assert summary_of(folder) == {} and last_checkpoint(folder) is None


@pytest.mark.parametrize("status", ["diverged", "collapsed"])
def test_what_ended_badly_is_not_gone_on_with(status, tmp_path):
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "summary.json").write_text(f'{{"status": "{status}"}}')
    with pytest.raises(ConfigError, match=f"has {status}"):
        refuse_ended(tmp_path)


def test_of_two_that_begin_at_once_the_slower_one_changes_nothing(pool, image_folders, tmp_path, monkeypatch, capfd):
    """The other's configuration appears between the first look and the beginning of the fit."""
    monkeypatch.chdir(tmp_path)
    without_pictures(monkeypatch)
    file = write_yaml(tmp_path / "pools" / "tiny.yaml", pool_config(pool, image_folders))
    run = Path("runs/n/a")
    plain = MergingModule.configure_optimizers

    def slow(self):
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text("the other's")
        return plain(self)

    monkeypatch.setattr(MergingModule, "configure_optimizers", slow)
    words = ["--config", file, "--config", LAYER_WISE, *QUICK, "--trainer.max_steps=2", "--name=n", "--id=a"]
    outcome = command(capfd, "fit", *words)
    assert outcome.code == 2 and "holds a run already" in outcome.error
    assert (run / "config.yaml").read_text() == "the other's"
    assert [path.name for path in run.iterdir() if path.name != ".lock"] == ["config.yaml"]


@pytest.mark.parametrize("given", [{"name": "../evil"}, {"id": "../x"}, {"name": "a/b"}, {"id": ".."}])
def test_a_name_leads_nowhere_else(given):
    settings = SimpleNamespace(**{"runs": "runs", "name": "n", "id": "i", **given})
    with pytest.raises(ConfigError, match="is no name of a folder"):
        run_folder(settings, [])
