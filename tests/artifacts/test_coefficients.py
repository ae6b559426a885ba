"""The coefficient file: damage, strangers and other models are refused by name; nothing else is ever raised."""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from adamerge.artifacts.coefficients import Coefficients, load_coefficients, save_coefficients  # fmt: skip
from adamerge.errors import CoefficientsError
from adamerge.io.coefficient_file import digest_of, read_coefficients
from adamerge.io.safetensors_file import TensorFile
from adamerge.parametrizations import Concrete, LayerWise
from adamerge.parametrizations.constraints import Softmax
from adamerge.task_vectors.task_vectors import TaskVectors


def rewritten(saved: Path, target: Path, change: Callable[[dict], object], values: dict | None = None) -> Path:
    """The file with changed metadata, otherwise intact, and signed again: not damage but another recipe."""
    metadata, sections = read_coefficients(saved)
    metadata = json.loads(json.dumps(metadata))
    replaced = change(metadata)
    tensors = {f"w/{group}": value for group, value in sections["w"].items()} if values is None else values
    metadata = metadata if replaced is None else replaced
    if isinstance(metadata, dict) and isinstance(metadata.get("digest"), str):
        metadata["digest"] = digest_of(metadata, {name: value.float() for name, value in tensors.items()})
    text = json.dumps(metadata)
    target.write_bytes(safetensors.torch.save(tensors, {"adamerge": text}))
    return target


def set_(*path: object) -> Callable[[dict], None]:
    *keys, last, value = path

    def change(metadata: dict) -> None:
        for key in keys:
            metadata = metadata[key]
        metadata[last] = value

    return change


# contents ------------------------------------------------------------------------------------------------------------


def test_the_table_is_by_name_after_the_constraint(saved):
    table = load_coefficients(saved).table()
    assert table.keys() == {"a.weight", "b"}
    assert table["b"] == {"cars": [pytest.approx(0.3)], "dtd": [pytest.approx(0.4)]}


def test_a_file_whose_softmax_was_asked_to_start_elsewhere_still_loads(models, tmp_path):
    """Version 0.1 wrote the init that was asked for; the softmax had started at 1 / experts all the same."""
    vectors = TaskVectors(**models)
    shares = partial(LayerWise, init=None, constraint=Softmax())
    for parametrization in (shares(vectors), Concrete(vectors, shares)):
        save_coefficients(Coefficients(vectors, parametrization), tmp_path / "new.safetensors")
        values = {f"w/{name}": torch.tensor([[1.0], [2.0]]) for name in vectors}
        values |= {f"mask/{name}": logits.detach() for name, logits in parametrization.masks().items()}

        def as_it_was(metadata: dict) -> None:
            arguments = metadata["parametrization"]["init_args"]
            (arguments["inner"]["init_args"] if "inner" in arguments else arguments)["init"] = 0.3

        old = rewritten(tmp_path / "new.safetensors", tmp_path / "old.safetensors", as_it_was, values)
        loaded = load_coefficients(old).parametrization
        assert loaded.initial == 0.5
        assert loaded.coefficients()["b"][:, 0].tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])


def test_the_file_is_fp32_and_readable_without_this_package(saved):
    with safetensors.safe_open(saved, "pt") as file:
        assert sorted(file.keys()) == ["w/a.weight", "w/b"]
        assert file.get_tensor("w/b").dtype == torch.float32
        metadata = json.loads(file.metadata()["adamerge"])
    assert metadata["format"] == 2 and list(metadata["experts"]) == ["cars", "dtd"]
    assert metadata["parametrization"]["init_args"]["constraint"]["init_args"] == {"low": 0.0, "high": 1.0}
    assert len(metadata["states"][0]["thresholds"]) == 2


def test_saving_replaces_the_file_whole(saved, models, tmp_path):
    target = tmp_path / "deep" / "c.safetensors"
    loaded = load_coefficients(saved)
    save_coefficients(loaded, target)
    save_coefficients(loaded, target)
    assert target.read_bytes() == saved.read_bytes() and [p.name for p in target.parent.iterdir()] == [target.name]


# damage --------------------------------------------------------------------------------------------------------------


def test_truncation_at_every_byte_is_a_coefficients_error_naming_the_file(saved, tmp_path):
    content, path = saved.read_bytes(), tmp_path / "short.safetensors"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CoefficientsError, match="short.safetensors"):
            read_coefficients(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(CoefficientsError):
        read_coefficients(path)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x80\x04pickle", b"PK\x03\x04" + b"\0" * 99])
def test_what_is_no_such_file_is_a_coefficients_error(tmp_path, content):
    path = tmp_path / "c.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CoefficientsError, match="c.safetensors"):
        load_coefficients(path)


def test_a_folder_and_a_model_are_no_coefficient_files(models, tmp_path):
    for path in (tmp_path, models["base"]):
        with pytest.raises(CoefficientsError):
            load_coefficients(path)


def attempt(path: Path, models: dict) -> object:
    """What loading gives: the coefficients, or the typed error; any other exception is the test's failure."""
    try:
        return load_coefficients(path, models["base"], models["experts"])
    except CoefficientsError as error:
        return error


def test_every_flipped_byte_loads_or_is_a_coefficients_error(saved, models, tmp_path):
    content, path = saved.read_bytes(), tmp_path / "flipped.safetensors"
    refused = 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 7)]) + content[place + 1 :])
        refused += isinstance(attempt(path, models), CoefficientsError)
    assert refused > 0.4 * len(content)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(some.lists(some.tuples(some.floats(0, 1, exclude_max=True), some.integers(0, 255)), min_size=1, max_size=4))
def test_random_bytes_load_or_are_a_coefficients_error(saved, models, tmp_path, edits):
    content = bytearray(saved.read_bytes())
    for place, value in edits:
        content[int(place * len(content))] = value
    path = tmp_path / "random.safetensors"
    path.write_bytes(content)
    attempt(path, models)


def test_a_flipped_bit_never_changes_the_coefficients_in_silence(saved, models, tmp_path):
    content, path = saved.read_bytes(), tmp_path / "flipped.safetensors"
    start = 8 + struct.unpack("<Q", content[:8])[0]
    silent = []
    for place in range(start, len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        if not isinstance(attempt(path, models), CoefficientsError):
            silent.append(place)
    assert not silent, f"{len(silent)} of {len(content) - start} bytes of the values may change unnoticed"


@pytest.mark.parametrize(
    "change",
    [
        set_("step", 6),
        set_("dtype", "bfloat16"),
        set_("protocol", {"seed": 77}),
        set_("version", "9"),
        set_("include", ["nothing.*"]),
        set_("base", "source", "/elsewhere"),
        set_("base", "fingerprint", "0" * 64),
        set_("experts", "cars", "source", "/elsewhere"),
        set_("parametrization", "init_args", "init", 0.25),
        set_("layout", "weights", "other.safetensors"),
    ],
)
def test_the_digest_covers_every_field(saved, tmp_path, change):
    """What is changed without being signed again is refused, though it is well formed."""
    file = TensorFile(saved)
    metadata = json.loads(file.metadata["adamerge"])
    before = json.dumps(metadata)
    metadata = change(metadata) or metadata
    assert json.dumps(metadata) != before
    tensors = {name: file.read(name).clone() for name in file.tensors}
    (tmp_path / "c.safetensors").write_bytes(safetensors.torch.save(tensors, {"adamerge": json.dumps(metadata)}))
    with pytest.raises(CoefficientsError, match="digest"):
        read_coefficients(tmp_path / "c.safetensors")


INTERVAL = "adamerge.parametrizations.constraints.Interval"
CHUNKS, SCALE = "adamerge.parametrizations.ImportanceChunkWise", "adamerge.transforms.Scale"
DAMAGE = {
    "version": set_("format", 3),
    "no version": lambda m: m.pop("format") and None,
    "a field too many": set_("extra", 1),
    "a field too few": lambda m: m.pop("step") and None,
    "not an object": lambda m: [1],
    "no object at all": lambda m: "text",
    "experts a list": set_("experts", ["cars", "dtd"]),
    "experts a number": set_("experts", 3),
    "no experts": set_("experts", {}),
    "expert not an object": set_("experts", "cars", "here"),
    "expert without source": lambda m: m["experts"]["cars"].pop("source") and None,
    "expert without fingerprint": lambda m: m["experts"]["cars"].pop("fingerprint") and None,
    "base without fingerprint": lambda m: m["base"].pop("fingerprint") and None,
    "fingerprint a number": set_("base", "fingerprint", 5),
    "base a number": set_("base", 5),
    "an expert too few": lambda m: m["experts"].pop("dtd") and None,
    "rows a number": set_("rows", 5),
    "rows of numbers": set_("rows", [1, 2]),
    "rows in another order": set_("rows", ["dtd", "cars"]),
    "a row too many": set_("rows", ["cars", "dtd", "new"]),
    "sums a list": set_("transforms", [{"class_path": "adamerge.transforms.Combine", "init_args": {"sums": [1]}}]),
    "factors a number": set_("transforms", [{"class_path": SCALE, "init_args": {"factors": 2}}]),
    "factors of text": set_("transforms", [{"class_path": SCALE, "init_args": {"factors": {"cars": "x"}}}]),
    "an allocation of text": set_(
        "parametrization", {"class_path": CHUNKS, "init_args": {"allocation": {"a": "1"}}}
    ),
    "importance a number": set_(
        "parametrization", {"class_path": CHUNKS, "init_args": {"importance": 5}}
    ),
    "importance of text": set_(
        "parametrization", {"class_path": CHUNKS, "init_args": {"importance": {"a": "1"}}}
    ),
    "parts a fraction": set_(
        "parametrization", {"class_path": "adamerge.parametrizations.RandomPartition", "init_args": {"parts": 1.5}}
    ),
    "seed a list": set_(
        "parametrization", {"class_path": "adamerge.parametrizations.RandomPartition", "init_args": {"seed": [1]}}
    ),
    "include a number": set_("include", 5),
    "include nothing": set_("include", ["nothing.*"]),
    "exclude a tensor": set_("exclude", ["b"]),
    "transforms null": set_("transforms", None),
    "transform a number": set_("transforms", [5]),
    "transform without class": set_("transforms", [{"init_args": {}}]),
    "transform without arguments": set_("transforms", 0, {"class_path": "adamerge.transforms.Ties"}),
    "transform of another kind": set_("transforms", 0, "class_path", "adamerge.Clamp"),
    "abstract transform": set_("transforms", 0, {"class_path": "adamerge.transforms.Transform", "init_args": {}}),
    "argument out of range": set_("transforms", 0, "init_args", {"keep": 7}),
    "argument of another type": set_("transforms", 0, "init_args", {"keep": "half"}),
    "unknown argument": set_("transforms", 0, "init_args", {"kept": 0.2}),
    "states too few": set_("states", []),
    "states too many": set_("states", [{}, {}]),
    "states of other names": set_("states", [{"limits": [0.0, 0.0], "majority": [1.0]}]),
    "states too short": set_("states", [{"thresholds": [0.0], "majority": [1.0]}]),
    "states of text": set_("states", [{"thresholds": ["0", "0"], "majority": [1.0]}]),
    "parametrization of another grain": set_("parametrization", "class_path", "adamerge.TaskWise"),
    "parametrization missing": set_("parametrization", None),
    "abstract parametrization": set_("parametrization", "class_path", "adamerge.parametrizations.Linear"),
    "no such class": set_("parametrization", "class_path", "adamerge.parametrizations.Nothing"),
    "no such module": set_("parametrization", "class_path", "adamerge.nothing.Nothing"),
    "a function": set_("parametrization", "class_path", "adamerge.artifacts.export.export"),
    "class path a number": set_("parametrization", "class_path", 5),
    "class path without a module": set_("parametrization", "class_path", "LayerWise"),
    "class path empty": set_("parametrization", "class_path", ""),
    "arguments a list": set_("parametrization", "init_args", [1]),
    "constraint a text": set_("parametrization", "init_args", "constraint", "Clamp"),
    "constraint abstract": set_("parametrization", "init_args", "constraint", "class_path", INTERVAL),
    "constraint a layout": set_(
        "parametrization", "init_args", "constraint", {"class_path": "adamerge.io.model_folder.Layout", "init_args": {}}
    ),
    "init far too big": set_("parametrization", "init_args", "init", 10**400),
    "init too big for fp32": lambda m: m["parametrization"].update(
        {"class_path": "adamerge.parametrizations.LayerWise", "init_args": {"init": 1e39}}
    ),
    "half a letter": set_("protocol", {"note": "\ud800"}),
    "init outside": set_("parametrization", "init_args", "init", 7.0),
    "dtype of no such name": set_("dtype", "float31"),
    "dtype a number": set_("dtype", 32),
    "dtype a module": set_("dtype", "nn"),
    "dtype a function": set_("dtype", "load"),
    "dtype of integers": set_("dtype", "int64"),
    "dtype of bits": set_("dtype", "bool"),
    "layout null": set_("layout", None),
    "layout files a list": set_("layout", "files", ["c.json"]),
    "step a text": set_("step", "five"),
    "protocol a list": set_("protocol", [1]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_recipe_is_a_coefficients_error(saved, models, tmp_path, damage):
    file = rewritten(saved, tmp_path / "c.safetensors", DAMAGE[damage])
    with pytest.raises(CoefficientsError, match="c.safetensors|recipe"):
        load_coefficients(file, models["base"], models["experts"] if "expert" not in damage else None)


VALUES = {
    "another section": {"x/b": torch.zeros(2, 1)},
    "no section": {"b": torch.zeros(2, 1)},
    "half precision": {"w/b": torch.zeros(2, 1, dtype=torch.bfloat16)},
    "one dimension": {"w/b": torch.zeros(2)},
    "not a number": {"w/b": torch.tensor([[math.nan], [0.0]])},
    "infinite": {"w/b": torch.tensor([[math.inf], [0.0]])},
    "a group too few": {"w/b": torch.zeros(2, 1)},
    "a group too many": {"w/b": torch.zeros(2, 1), "w/a.weight": torch.zeros(2, 1), "w/c": torch.zeros(2, 1)},
    "experts too many": {"w/b": torch.zeros(3, 1), "w/a.weight": torch.zeros(3, 1)},
    "chunks too many": {"w/b": torch.zeros(2, 2), "w/a.weight": torch.zeros(2, 1)},
}


@pytest.mark.parametrize("values", VALUES)
def test_values_that_do_not_belong_are_a_coefficients_error(saved, tmp_path, values):
    file = rewritten(saved, tmp_path / "c.safetensors", lambda m: None, VALUES[values])
    with pytest.raises(CoefficientsError, match="c.safetensors"):
        load_coefficients(file)


# strangers ------------------------------------------------------------------------------------------------------------

CANARY = """
from pathlib import Path
Path(__file__).with_suffix(".sang").touch()
from adamerge.parametrizations.constraints import Free
from adamerge.transforms import Elementwise
class Canary(Elementwise):
    def apply(self, name, deltas, state):
        return deltas
"""


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module of someone else that leaves a trace when it is imported, at any of several names."""
    names = ("canary_module", "adamergeevil", "adamerge_plugins")
    for name in names:
        (tmp_path / f"{name}.py").write_text(CANARY)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda: sorted(path.stem for path in tmp_path.glob("*.sang"))
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["canary_module", "adamergeevil", "adamerge_plugins"])
@pytest.mark.parametrize("where", ["transform", "parametrization", "nested", "deep"])
def test_foreign_classes_are_refused_and_never_imported(saved, models, tmp_path, canary, name, where):
    spec = {"class_path": f"{name}.Canary", "init_args": {}}
    change = {
        "transform": set_("transforms", [spec]),
        "parametrization": set_("parametrization", spec),
        "nested": set_("parametrization", "init_args", "constraint", spec),
        "deep": set_("parametrization", "init_args", "constraint", "init_args", {"low": spec}),
    }[where]
    file = rewritten(saved, tmp_path / "c.safetensors", change)
    with pytest.raises(CoefficientsError, match=f"'{name}.Canary', which is not part of adamerge") as found:
        load_coefficients(file)
    assert canary() == [] and name not in sys.modules
    assert f"--allow-plugins {name}" in found.value.todo
    read_coefficients(file)
    assert canary() == []


def test_an_allowed_prefix_lets_exactly_it_in(saved, tmp_path, canary):
    def change(metadata: dict) -> None:
        metadata["transforms"], metadata["states"] = [{"class_path": "canary_module.Canary", "init_args": {}}], [{}]

    file = rewritten(saved, tmp_path / "c.safetensors", change)
    for prefix in ("canary", "canary_module.sub", "", "anary_module"):
        with pytest.raises(CoefficientsError, match="not part of adamerge"):
            load_coefficients(file, plugins=[prefix])
    assert canary() == []
    loaded = load_coefficients(file, plugins=["canary_module"])
    assert type(loaded.task_vectors.transforms[0]).__module__ == "canary_module" and canary() == ["canary_module"]
