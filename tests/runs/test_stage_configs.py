"""Configurations of stages: each stage can be fitted as far as it can be known before the ones before it ran."""

from pathlib import Path

import pytest
import yaml
from adamerge.runs.stage_configs import validated
from running import METHODS, QUICK, command, pool_config, write_yaml

from adamerge.errors import ConfigError


@pytest.fixture
def pool_file(pool, image_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_yaml(tmp_path / "pools" / "tiny.yaml", pool_config(pool, image_folders))


@pytest.mark.parametrize("name", ["concrete_adamerging_task_wise", "expert_merging_plusplus"])
def test_what_earlier_stages_have_yet_to_write_is_no_fault(name, pool_file):
    """A mask of the first stage, importances of its tensors, a folder of the run."""
    first = validated(["--config", str(pool_file), "--config", str(METHODS / name), *QUICK])
    assert first.config.trainer.max_steps == (2000 if "concrete" in name else 50)
    assert sorted(path.name for path in Path().iterdir()) == ["pools"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"objective": {"class_path": "adamerge.CrossEntropy"}}, "CrossEntropy needs labels"),
        ({"search": {"lr": -1.0}}, "model.search.lr"),
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
        validated(arguments)
    outcome = command(capfd, "fit", *arguments)
    assert outcome.code == 2 and named in outcome.error and not Path("runs").exists()
