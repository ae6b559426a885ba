"""A configured fit: the same settings give the module, its data and its trainer."""

import pytest
from lightning import LightningDataModule
from running import LAYER_WISE, pool_config, write_yaml

from adamerge import ImageCalibration, MergingModule
from adamerge.errors import ConfigError
from adamerge.runs.early_checks import checked_parts
from adamerge.runs.instantiate import Configured
from adamerge.runs.parser import read_first
from adamerge.training.callbacks import RunawayGuard
from adamerge.training.collapse_guard import CollapseGuard

KEEP = "--trainer.callbacks=[{class_path: KeepBest, init_args: {selection: {class_path: HighestScore}}}]"


@pytest.fixture
def settings(pool, image_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = str(write_yaml(tmp_path / "pool.yaml", pool_config(pool, image_folders)))
    return lambda *words: read_first([file, str(LAYER_WISE), "--trainer.max_steps=3", *words])


def test_module_data_and_trainer(settings):
    given = settings("--data.batch_size=3", "--trainer.accelerator=cpu")
    fit = Configured(given, checked_parts(given))
    assert isinstance(fit.model, MergingModule) and fit.model.merged.task_vectors.experts == ("colours", "shapes")
    assert isinstance(fit.datamodule, ImageCalibration) and isinstance(fit.datamodule, LightningDataModule)
    assert fit.datamodule.batch_size == 3 and fit.callbacks == [] and fit.loggers is None
    trainer = fit.trainer_with([CollapseGuard()], logger=False)
    assert (trainer.max_steps, trainer.max_epochs, trainer.log_every_n_steps) == (3, 1, 10)
    assert any(isinstance(one, CollapseGuard) for one in trainer.callbacks)


def test_a_callback_of_the_users_stands_for_the_one_that_would_be_added(settings):
    words = [KEEP, "--trainer.callbacks+=CollapseGuard"]
    fit = Configured(settings(*words))
    assert [type(one).__name__ for one in fit.callbacks] == ["KeepBest", "CollapseGuard"]
    trainer = fit.trainer_with([CollapseGuard(), RunawayGuard()], logger=False)
    names = [type(one).__name__ for one in trainer.callbacks]
    assert names.count("CollapseGuard") == 1 and names.count("RunawayGuard") == 1 and names.count("KeepBest") == 1


def test_what_lightning_refuses_is_told(settings):
    with pytest.raises(ConfigError, match="trainer: "):
        Configured(settings("--trainer.accelerator=abacus")).trainer_with([])
