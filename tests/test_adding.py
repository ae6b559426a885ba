"""CONTRIBUTING.md: every part is in every place that its table names, and the network of one's own works as printed."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from running import ROOT, coefficients, command, write_yaml
from safetensors.torch import load_file, save_file
from toy_points import TASKS, head_of, weights_of

import adamerge

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Kind:
    """A row of the table.

    Attributes:
        name: what a part of this kind is called.
        base: what it is a subclass of, below ``adamerge``.
        file: where it stands, below ``adamerge``, with FILE for the module's name.
        places: where its name stands, with FILE, and LIST after a colon.
    """

    name: str
    base: str
    file: str
    places: tuple[str, ...]


def kinds_of(text: str) -> list[Kind]:
    """The rows of the table of parts."""
    everywhere = re.search(r"All parts are also in `([^`]+)` and\n?`([^`]+)`", text)
    assert everywhere, "CONTRIBUTING.md says no longer where all parts are"
    found = []
    for line in text.partition("| a new |")[2].splitlines()[2:]:
        if not line.startswith("| "):
            break
        name, base, file, places = (cell.strip() for cell in line.strip("|").split("|"))
        found.append(
            Kind(name, base.strip("`"), file.strip("`"), (*everywhere.groups(), *re.findall("`([^`]+)`", places)))
        )
    return found


KINDS = kinds_of(TEXT)
SHORT = ("--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0", "--trainer.max_steps=2")


def base_of(kind: Kind) -> type | None:
    """The class that parts of a kind are derived from; None while the package has no such kind."""
    module, _, name = kind.base.rpartition(".")
    if not module and name not in adamerge.__all__:
        return None
    holder = importlib.import_module(f"adamerge.{module}") if module else adamerge
    base = getattr(holder, name)
    assert isinstance(base, type)
    return base


def parts_of(kind: Kind) -> list[type]:
    """Every final class of the kind in the files where such parts stand.

    A class that is not public counts too, for it may have been forgotten, unless others derive from it.
    """
    base, found = base_of(kind), []
    if base is None:
        return []
    for path in sorted((ROOT / "adamerge").glob(kind.file.replace("FILE", "*"))):
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name, member in inspect.getmembers(module, inspect.isclass):
            own = member.__module__ == module.__name__ and not name.startswith("_")
            shared = name not in adamerge.__all__ and type.__subclasses__(member)
            if own and issubclass(member, base) and not inspect.isabstract(member) and not shared:
                found.append(member)
    return found


def names_in(place: str) -> set[str]:
    """What stands in a file; or in a list, or among the keys of a dictionary, of that file; or under ``TYPE_CHECKING``."""
    path, _, wanted = place.partition(":")
    if not (ROOT / path).is_file():
        return set()
    text = (ROOT / path).read_text(encoding="utf-8")
    return names_under(ast.parse(text), wanted) if wanted else set(re.findall(r"\w+", text))


def names_under(tree: ast.Module, wanted: str) -> set[str]:
    """Names in what the module assigns to ``wanted``, or imports under ``if TYPE_CHECKING``."""
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == wanted:
            return {alias.name for line in node.body if isinstance(line, ast.ImportFrom) for alias in line.names}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == wanted for target in targets):
            return set(entries_of(node.value))  # type: ignore[attr-defined]
    raise AssertionError(f"there is no {wanted}")


def entries_of(value: ast.expr) -> Iterator[str]:
    """Names in a list; of a dictionary the keys alone, or its values' where keys are of something else."""
    if isinstance(value, ast.Dict):
        keys = {key.value for key in value.keys if isinstance(key, ast.Constant)}
        yield from map(str, keys)
        if not any(str(key)[0].isupper() for key in keys):
            yield from re.findall(r"\w+", ast.unparse(value))
    else:
        yield from re.findall(r"\w+", ast.unparse(value))


def missing(part: type, kind: Kind) -> list[str]:
    """The places of the kind that do not name the part."""
    file = Path(inspect.getfile(part)).stem
    places = [place.replace("FILE", file).replace("NAME", part.__name__) for place in kind.places]
    return [place for place in places if part.__name__ not in names_in(place)]


PARTS = [pytest.param(kind, part, id=part.__name__) for kind in KINDS for part in parts_of(kind)]


@pytest.mark.parametrize(("kind", "part"), PARTS)
def test_a_part_is_in_every_place_that_contributing_names(kind, part):
    forgotten = missing(part, kind)
    lines = "\n".join(f"  - {place}" for place in forgotten)
    assert not forgotten, (
        f"{part.__name__}: CONTRIBUTING.md has the places of a new {kind.name}; it is missing in\n{lines}"
    )


def test_the_table_has_every_public_part():
    """A kind of its own needs a row; a part in another file than its kind's is in no room's list."""
    listed = {part.__name__ for param in PARTS for part in param.values[1:]}
    bases = [base for base in map(base_of, KINDS) if base is not None]
    public = {name: getattr(adamerge, name) for name in adamerge.HOMES}
    of_a_kind = {
        name
        for name, part in public.items()
        if isinstance(part, type)
        and issubclass(part, tuple(bases))
        and not inspect.isabstract(part)
        and not part.__module__.startswith("adamerge.testbed.")
    }
    assert of_a_kind <= listed
    assert len(KINDS) == len({kind.name for kind in KINDS}) >= 10 and len(listed) > 40
    assert {kind.name for kind in KINDS if base_of(kind) is None} <= {"search"}, "a kind that there is not"


@pytest.mark.parametrize("place", range(7))
def test_a_forgotten_place_is_told(place, monkeypatch):
    """Each of an objective's places in turn."""
    (kind,) = (kind for kind in KINDS if kind.name == "objective")
    (part,) = (part for part in parts_of(kind) if part.__name__ == "MarginalEntropy")
    assert missing(part, kind) == [] and len(kind.places) == 7
    there, wanted = names_in, kind.places[place].replace("FILE", "marginal_entropy")
    monkeypatch.setattr(
        sys.modules[__name__], "names_in", lambda one: there(one) - ({"MarginalEntropy"} if one == wanted else set())
    )
    assert missing(part, kind) == [wanted]


def test_the_rooms_are_those_of_the_architecture():
    from test_architecture import ORDER

    rows = TEXT.partition("| room |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", rows, re.MULTILINE) == ORDER


def test_every_file_that_it_names_is_there():
    for path in re.findall(r"`((?:adamerge|tests|configs)/[\w/.]*)[:`]", TEXT):
        assert "FILE" in path or (ROOT / path).exists(), path


def network_of_ones_own(folder: Path) -> Path:
    """The printed module."""
    (block,) = (text for text in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "(Backbone)" in text)
    assert len([line for line in block.splitlines() if line.strip()]) <= 25
    (folder / "points.py").write_text(block)
    return folder / "points.py"


@pytest.fixture
def printed(tmp_path, monkeypatch):
    """The module, importable from where the command runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    network_of_ones_own(tmp_path)
    yield tmp_path
    sys.modules.pop("points", None)


def test_a_network_of_ones_own_is_fitted_exported_and_loaded_again(printed, capfd):
    base, experts = weights_of()
    names = {"first": "0", "second": "2"}

    def write(name, weights, **more):
        renamed = {f"{names[key.split('.')[0]]}.{key.split('.')[1]}": value for key, value in weights.items()}
        save_file(renamed | more, printed / f"{name}.safetensors")
        return str(printed / f"{name}.safetensors")

    pool = {
        "model": {
            "backbone": {"class_path": "points.Points"},
            "task_vectors": {
                "base": write("base", base),
                "experts": {task: write(task, experts[task], head=head_of(task)) for task in TASKS},
                "exclude": ["head"],
            },
        },
        "data": {"class_path": "toy_points.ToyPoints"},
    }
    method = {"model": {"parametrization": "adamerge.TaskWise", "objective": "adamerge.Entropy"}}
    words = [write_yaml(printed / "pool.yaml", pool), write_yaml(printed / "method.yaml", method)]
    done = command(capfd, "fit", *words, *SHORT, "--name=n", "--id=a", "--export=merged")
    assert done.code == 0, done.err[-3000:]
    (learned,) = (value for value in coefficients(printed / "runs/n/a").values())
    assert learned.shape == (2, 1) and (learned - 0.5).abs().max() > 1e-4, "something was learned"
    merged, original = load_file(printed / "merged/model.safetensors"), load_file(printed / "base.safetensors")
    tuned = [load_file(printed / f"{task}.safetensors") for task in TASKS]
    assert merged.keys() == original.keys()
    for name, value in merged.items():
        exact = sum(float(learned[k]) * (tuned[k][name] - original[name]).double() for k in range(2)) + original[name]
        assert (value - exact).abs().max() <= 4 * 2.0**-24 * 4 * exact.abs().max().clamp_min(1)
    again = importlib.import_module("points").Points()
    again.network.load_state_dict(merged)
    inputs = torch.randn(6, 4)
    hidden = torch.tanh(inputs.double() @ merged["0.weight"].double().T + merged["0.bias"])
    expected = hidden @ merged["2.weight"].double().T + merged["2.bias"]
    assert torch.allclose(again.encode(inputs).features.double(), expected, atol=1e-6)
