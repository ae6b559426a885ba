"""Public names: every part that a file may name has one, configurations use no other, and former ones are understood."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import yaml
from running import LAYER_WISE, write_yaml

import adamerge
from adamerge.data import Calibration
from adamerge.errors import ConfigError
from adamerge.io.public_names import FORMER, current_name, find, is_public, public_name, renewed
from adamerge.runs.config_files import read_config
from adamerge.runs.overrides import overridden
from adamerge.runs.parser import read_first
from adamerge.runs.run_config import write_config
from adamerge.training.data_modules import of

ROOT = Path(__file__).parents[2]
KINDS = [
    "Backbone", "Calibration", "Constraint", "Copy", "Mask", "MergingModule", "Objective", "Parametrization", "Passes",
    "Penalty", "Selection", "Storage", "Teachers", "Transform", "View",
]  # fmt: skip
NOT_FOR_FILES = {
    "ClassCalibration": "what calibrations of classes share",
    "Beginning": "made with what each run begins with",
    "CoefficientFile": "made with the folder of each run",
    "SessionTimer": "made of trainer.max_time",
    "StepCheckpoints": "made with the folder of each run",
    "Summary": "made with the folder of each run",
}


def all_parts() -> list[type]:
    """Every class of the package, wherever it is, that can be made and that a configuration may ask for."""
    from lightning import Callback

    modules = [
        importlib.import_module(found.name)
        for found in pkgutil.walk_packages(adamerge.__path__, "adamerge.")
        if not found.name.endswith("__main__")
    ]
    kinds = (Callback, Calibration, *(getattr(adamerge, kind) for kind in KINDS))
    classes = {kind for module in modules for _, kind in inspect.getmembers(module, inspect.isclass)}
    return [
        kind
        for kind in sorted(classes, key=lambda kind: kind.__name__)
        if issubclass(kind, kinds) and kind.__module__.startswith("adamerge.") and not inspect.isabstract(kind)
        if not kind.__name__.startswith("_")
    ]


def test_every_part_has_a_public_name():
    parts = {kind.__name__: kind for kind in all_parts()}
    assert len(parts) > 60 and {"Concrete", "KeepBest", "TestbedImages", "ShardedCopy", "RunawayGuard"} < parts.keys()
    missing = [name for name in parts if name not in {*adamerge.__all__, *NOT_FOR_FILES}]
    assert not missing, f"{missing}: give them a line each in the table of adamerge/__init__.py"
    for name, kind in parts.items():
        if name not in NOT_FOR_FILES:
            part = of(kind) if issubclass(kind, Calibration) else kind
            assert getattr(adamerge, name) is part and public_name(part) == public_name(kind) == f"adamerge.{name}"
            assert find(f"adamerge.{name}") is kind


def test_type_checkers_see_the_same_names():
    """The imports for them are a second list, kept by this."""
    text = Path(adamerge.__file__).read_text().partition("if TYPE_CHECKING:")[2].partition("\ndef ")[0]
    listed = {name for line in re.sub(r"from \S+ import", "", text).splitlines() for name in re.findall(r"\w+", line)}
    assert listed | {"__version__"} == set(adamerge.__all__)


def test_former_names_are_those_of_what_is_there():
    """Each leads to a public name; a name that becomes a former one is added here, and none is ever taken away."""
    assert len(FORMER) >= 133
    for former, today in FORMER.items():
        assert is_public(today) and not is_public(former), former
        assert current_name(former) == today == current_name(today)
    for former in (
        "adamerge.constraints.Projection",
        "adamerge.modules.AdaptiveMerging",
        "adamerge.testbed.data.TestbedText",
    ):
        assert public_name(find(former)) == FORMER[former]
    for former in ("adamerge.parametrizations.linear.LayerWise", "adamerge.parametrizations.LayerWise"):
        assert FORMER[former] == "adamerge.LayerWise"


@pytest.mark.parametrize(
    "name", ["adamerge.export.export", "adamerge.cli", "", "adamerge", "adamerge.Projection.x", "os.gone", "gone.x"]
)
def test_nothing_else_has_a_public_name(name):
    assert not is_public(name) and current_name(name) == name
    with pytest.raises(LookupError, match="no part of this name" if name.startswith("adamerge.") else None):
        find(name)


def test_a_class_of_someone_elses_goes_by_its_full_name():
    assert public_name(yaml.SafeLoader) == "yaml.loader.SafeLoader"


def test_texts_that_are_former_names_are_renewed_wherever_they_are():
    old = {"a": [{"class_path": "adamerge.transforms.Ties", "x": "adamerge.transforms.Ties and more"}], "b": 3}
    assert renewed(old) == {"a": [{"class_path": "adamerge.Ties", "x": "adamerge.transforms.Ties and more"}], "b": 3}


def shipped() -> list[Path]:
    return sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", shipped(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_configurations_use_public_names(path):
    named = re.findall(r"\badamerge\.\w[\w.]*", path.read_text())
    assert all(is_public(name.rstrip(".")) for name in named), named


def test_a_configuration_of_former_homes_is_that_of_todays(tmp_path, monkeypatch):
    """Also where the module is gone, in files, in what is nested in them, and on the command line."""
    names = [
        "TestbedImages",
        "OpenClipClassifier",
        "LayerWise",
        "Clamp",
        "Entropy",
        "Bilevel",
        "Disk",
        "BlockCopy",
    ]
    monkeypatch.setattr(
        "adamerge.io.public_names.FORMER", {f"adamerge.gone.{name}": f"adamerge.{name}" for name in names}
    )
    old = {
        "model": {
            "backbone": {"class_path": "adamerge.gone.OpenClipClassifier", "init_args": {"architecture": "ViT-B-32"}},
            "parametrization": {
                "class_path": "adamerge.gone.LayerWise",
                "init_args": {"constraint": {"class_path": "adamerge.gone.Clamp", "init_args": {"high": 2.0}}},
            },
            "objective": "adamerge.gone.Entropy",
        },
        "data": {"class_path": "adamerge.gone.TestbedImages"},
        "search": "adamerge.gone.Bilevel",
    }
    file = write_yaml(tmp_path / "old.yaml", old)
    words = ["--config", str(file), "--model.copy=adamerge.gone.BlockCopy", "--model.storage=adamerge.gone.Disk"]
    words.append("--model.task_vectors.base=nothing")
    words.append("--model.task_vectors.experts={}")
    target = tmp_path / "config.yaml"
    write_config(read_first(words), target)
    text = target.read_text()
    assert text.startswith(f"# adamerge {adamerge.__version__}\n") and "gone" not in text
    content = yaml.safe_load(text)
    assert content["model"]["search"]["class_path"] == "adamerge.Bilevel"
    assert content["model"]["copy"]["class_path"] == "adamerge.BlockCopy"
    assert content["model"]["parametrization"]["init_args"]["constraint"]["class_path"] == "adamerge.Clamp"
    assert content["model"]["parametrization"]["init_args"]["constraint"]["init_args"]["high"] == 2.0
    written = re.findall(r"adamerge\.\w[\w.]*", text.partition("\n")[2])
    assert len(written) >= 8 and all(map(is_public, written))
    assert (
        overridden(read_config(file), ["--model.copy=adamerge.gone.BlockCopy"])["model"]["copy"] == "adamerge.BlockCopy"
    )


def test_a_private_name_in_a_file_is_refused_with_the_near_one(tmp_path):
    file = write_yaml(tmp_path / "c.yaml", {"model": {"list": [{"class_path": "adamerge.objectives.Entrpy"}]}})
    with pytest.raises(ConfigError, match=r"c\.yaml: adamerge has no part 'adamerge\.objectives\.Entrpy'") as found:
        read_config(file)
    assert found.value.todo == "did you mean 'adamerge.Entropy'?"
    assert read_config(LAYER_WISE)["model"]["objective"]["class_path"] == "adamerge.Entropy"
