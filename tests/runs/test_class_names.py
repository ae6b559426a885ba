"""Classes by name: short and full ones, of the package, of libraries and of the user's own, and near ones."""

import sys
import types

import pytest
import torch

from adamerge import Backbone, Entropy, Objective, Parametrization
from adamerge.errors import ConfigError
from adamerge.runs.class_names import class_named, such_as


@pytest.fixture
def mine(monkeypatch):
    module = types.ModuleType("mypaper")
    module.Mine = type("Mine", (Entropy,), {"__module__": "mypaper"})
    monkeypatch.setitem(sys.modules, "mypaper", module)
    return module


def test_a_class_by_any_of_its_names(mine):
    for name in ("Entropy", "adamerge.Entropy", "adamerge.objectives.Entropy"):
        assert class_named("k", name, Objective) is Entropy
    assert class_named("k", "mypaper.Mine", Objective) is mine.Mine
    assert class_named("k", "CausalLM", Backbone).__name__ == "CausalLM"
    for name in ("AdamW", "torch.optim.AdamW"):
        assert class_named("k", name, torch.optim.Optimizer) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("name", "kind", "what"),
    [
        ("Entrpy", Objective, "there is no objective 'Entrpy'; did you mean 'Entropy'?"),
        ("entropy", Objective, "there is no objective 'entropy'; did you mean 'Entropy'?"),
        ("adamerge.Entrpy", Objective, "there is no objective 'adamerge.Entrpy'; did you mean 'adamerge.Entropy'?"),
        ("mypaper.Min", Objective, "there is no objective 'mypaper.Min'; did you mean 'mypaper.Mine'?"),
        ("Zzzzz", Objective, "there is no objective 'Zzzzz'"),
        ("nopaper.Mine", Objective, "there is no class 'nopaper.Mine': No module named 'nopaper'"),
        (".Entropy", Objective, "there is no objective '.Entropy'; did you mean 'Entropy'?"),
        ("Layerwise", Parametrization, "there is no parametrization 'Layerwise'; did you mean 'LayerWise'?"),
        (
            "torch.optim.Adm",
            torch.optim.Optimizer,
            "there is no optimizer 'torch.optim.Adm'; did you mean 'torch.optim.Adam'?",
        ),
    ],
)
def test_an_unknown_name_is_told_with_the_nearest(name, kind, what, mine):
    with pytest.raises(ConfigError) as found:
        class_named("model.part", name, kind)
    assert found.value.what == f"model.part: {what}"


def test_a_module_that_fails_to_load_is_told(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "torn_paper.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match="there is no class 'torn_paper.Mine': division by zero"):
        class_named("k", "torn_paper.Mine", Objective)


def test_what_could_stand_there():
    assert such_as(Objective).startswith("CrossEntropy, Entropy, ") and "Objective," not in such_as(Objective)
    assert such_as(torch.optim.Optimizer) == "a class derived from torch.optim.optimizer.Optimizer"
