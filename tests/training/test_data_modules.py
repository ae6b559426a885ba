"""Data modules: what Lightning takes, of the plain class's name and kind; pickled, printed and configured as such."""

import dataclasses
import inspect
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningDataModule
from running import write_yaml
from toy_points import ToyPoints

import adamerge
from adamerge import data as plain
from adamerge.io.public_names import public_name
from adamerge.runs.parser import read_first
from adamerge.testbed import data as testbed
from adamerge.training.data_modules import DataModule, of

KINDS = [
    "ImageCalibration", "ImageTextCalibration", "LanguageCalibration", "NoData", "TestbedImages", "TestbedLanguage",
    "TestbedText", "TextCalibration",
]  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_public_name_is_the_data_module_of_the_plain_class(name):
    home = plain if hasattr(plain, name) else testbed
    made, kind = getattr(adamerge, name), getattr(home, name)
    assert made is of(kind) is of(made) and made is not kind and not issubclass(kind, LightningDataModule)
    assert issubclass(made, kind) and issubclass(made, adamerge.Calibration) and issubclass(made, LightningDataModule)
    assert public_name(made) == public_name(kind) == f"adamerge.{name}"
    assert inspect.signature(made) == inspect.signature(kind) and made.__doc__ == kind.__doc__


def test_calibration_itself():
    assert adamerge.Calibration is of(plain.Calibration) is DataModule
    assert (
        public_name(adamerge.Calibration) == "adamerge.Calibration" and adamerge.Calibration.__name__ == "Calibration"
    )
    with pytest.raises(TypeError, match="abstract"):
        adamerge.Calibration()


def test_all_kinds_of_data_are_data_modules_in_public():
    for name in adamerge.__all__:
        part = getattr(adamerge, name)
        if inspect.isclass(part) and issubclass(part, plain.Calibration):
            assert issubclass(part, DataModule), name


def test_the_trainer_is_the_loop():
    data = ToyPoints()
    assert data.trainer is None and data.loop is None
    data.trainer = loop = SimpleNamespace(
        max_steps=3, global_step=0, global_rank=0, world_size=1, lightning_module=None
    )
    assert data.loop is loop and data.trainer is loop
    data.setup("fit")
    assert data._backbone is None, "there is no module to take it from"
    loop.lightning_module = SimpleNamespace(merged=SimpleNamespace(backbone="network"))
    data.setup("fit")
    assert data._backbone == "network"


def test_it_is_pickled_with_its_state_as_what_it_is():
    data = adamerge.TextCalibration(tasks={"one": adamerge.TextTask("x/y.csv")}, batch_size=3)
    again = pickle.loads(pickle.dumps(data))
    assert type(again) is type(data) and (again.batch_size, again.sources) == (3, data.sources)
    # a class that a module holds by name goes by it
    points = pickle.loads(pickle.dumps(ToyPoints(rows=7)))
    assert type(points) is ToyPoints and points.rows_each == 7


@pytest.mark.slow
def test_another_process_reads_what_is_pickled():
    text = pickle.dumps(adamerge.TextCalibration(tasks={"one": adamerge.TextTask("x/y.csv")}, seed=5)).hex()
    code = (
        f"import pickle; data = pickle.loads(bytes.fromhex('{text}')); print(type(data).__name__, data.seed, data.loop)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.split() == ["TextCalibration", "5", "None"]


def test_it_says_its_name_and_arguments_and_opens_nothing():
    text = repr(adamerge.TextCalibration(tasks={"one": adamerge.TextTask("nowhere.csv")}, batch_size=3))
    assert text.startswith("TextCalibration(batch_size=3, seed=0, ") and "DataModule" not in text


@dataclasses.dataclass(eq=False, kw_only=True)
class Mine(plain.TextCalibration):
    """Somebody's data, a plain class.

    Args:
        twice: asked for by this class alone.
    """

    twice: bool = False


@dataclasses.dataclass(eq=False, kw_only=True)
class Ours(adamerge.TextCalibration):
    """Somebody's data, a data module.

    Args:
        twice: asked for by this class alone.
    """

    twice: bool = False


@pytest.mark.parametrize("kind", [of(Mine), Ours])
def test_a_class_of_the_users_own(kind):
    data = kind(tasks={"one": adamerge.TextTask("x/y.csv")}, twice=True, batch_size=2)
    assert isinstance(data, DataModule) and isinstance(data, plain.Calibration) and of(kind) is kind
    assert (data.twice, data.batch_size, data.trainer) == (True, 2, None)
    assert public_name(kind) == f"{__name__}.{kind.__name__}"
    assert type(pickle.loads(pickle.dumps(data))) is kind


def test_one_goes_by_its_class_path_in_a_configuration(tmp_path, monkeypatch):
    (tmp_path / "ownpaper.py").write_text(
        "from dataclasses import dataclass\n\nfrom adamerge import TextCalibration\n\n\n"
        '@dataclass(eq=False, kw_only=True)\nclass Own(TextCalibration):\n    """Own data."""\n\n    twice: bool = False\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = {
        "class_path": "ownpaper.Own",
        "init_args": {"tasks": {"one": {"dataset": "x/y.csv"}}, "twice": True, "batch_size": 2},
    }
    file = write_yaml(tmp_path / "pool.yaml", {"data": data})
    words = ["--config", str(file), "--model.backbone=OpenClipClassifier", "--model.backbone.architecture=ViT-B-32"]
    words += [
        "--model.parametrization=LayerWise",
        "--model.task_vectors.base=b",
        "--model.task_vectors.experts={one: x}",
    ]
    settings = read_first(words)
    assert settings.data.class_path == "ownpaper.Own"
    given = settings.data.init_args
    assert (given.twice, given.batch_size, given.tasks["one"].init_args.dataset) == (True, 2, "x/y.csv")


def test_batches_go_to_the_device_without_the_numbers():
    data = ToyPoints()
    data.trainer = SimpleNamespace(max_steps=2, global_step=0, global_rank=0, world_size=1)
    data._backbone = SimpleNamespace(preprocess=torch.tensor)
    batch = data.steps()[0]
    there = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert there["one"].inputs.device.type == "meta" and there["one"].indices is batch["one"].indices
