"""The coefficient file: learned values, the recipe that gives them meaning, and which models they belong to."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import adamerge
from adamerge.constraints import Constraint
from adamerge.errors import AdamergeError, CoefficientsError
from adamerge.files import TensorFile
from adamerge.layout import Layout
from adamerge.parametrizations import Parametrization
from adamerge.staging import staged_file
from adamerge.task_vectors import Source, TaskVectors
from adamerge.transforms import Transform

FORMAT = 1
METADATA_KEY = "adamerge"
BUILDABLE = (Constraint, Parametrization, Transform)
FIELDS = {
    "format", "version", "step", "base", "experts", "include", "exclude", "transforms", "states", "parametrization",
    "dtype", "layout", "protocol",
}  # fmt: skip


@dataclass(frozen=True)
class Coefficients:
    """Everything that ``export`` needs, besides the models' own files.

    Attributes:
        task_vectors: base and experts, opened, transforms applied.
        parametrization: with the learned values in it.
        layout: of the exported folder.
        dtype: of the merged copy they were learned on.
        step: optimiser steps they were learned for.
        protocol: which data were used, and how.

    """

    task_vectors: TaskVectors
    parametrization: Parametrization
    layout: Layout = field(default_factory=Layout)
    dtype: torch.dtype = torch.float32
    step: int = 0
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def table(self) -> dict[str, dict[str, list[float]]]:
        """Group name to expert name to coefficients, after the constraint."""
        experts = self.task_vectors.experts
        with torch.no_grad():
            return {
                group: {task: row.tolist() for task, row in zip(experts, value, strict=True)}
                for group, value in self.parametrization.coefficients().items()
            }


def save_coefficients(coefficients: Coefficients, path: str | Path) -> None:
    """Write the file atomically; the same coefficients give the same bytes.

    Raises:
        ExportError: the file cannot be written.

    """
    vectors = coefficients.task_vectors
    metadata = {
        "format": FORMAT,
        "version": adamerge.__version__,
        "step": coefficients.step,
        "base": {"source": vectors.base.location, "fingerprint": vectors.base.fingerprint},
        "experts": {
            task: {"source": checkpoint.location, "fingerprint": checkpoint.fingerprint}
            for task, checkpoint in vectors.checkpoints.items()
        },
        "include": list(vectors.include),
        "exclude": list(vectors.exclude),
        "transforms": [describe(transform) for transform in vectors.transforms],
        "states": vectors.states,
        "parametrization": describe(coefficients.parametrization),
        "dtype": str(coefficients.dtype).removeprefix("torch."),
        "layout": {"weights": coefficients.layout.weights, "files": dict(coefficients.layout.files)},
        "protocol": dict(coefficients.protocol),
    }
    values = {f"w/{group}": value.contiguous().cpu() for group, value in coefficients.parametrization.values().items()}
    with staged_file(Path(path)) as temporary:
        temporary.write_bytes(safetensors.torch.save(values, {METADATA_KEY: json.dumps(metadata)}))


def load_coefficients(
    path: str | Path,
    base: Source | None = None,
    experts: Mapping[str, Source] | None = None,
    plugins: Sequence[str] = (),
    verify: bool = True,
) -> Coefficients:
    """Open a coefficient file and the models it names.

    Args:
        path: the file.
        base: where the base is now, when not where the file says.
        experts: where experts are now, by name, when not where the file says; the others stay.
        plugins: prefixes of further modules that the recipe may name; by default ``adamerge.`` alone.
        verify: compare the models' fingerprints with the file's, which reads every weight once.

    Raises:
        CoefficientsError: the file is corrupt, of an unknown version, names foreign classes, or belongs to other models.
        CheckpointError: a model cannot be opened.

    """
    path = Path(path)
    metadata, values = read_coefficients(path)
    moved = dict(experts or {})
    unknown = sorted(moved.keys() - metadata["experts"].keys())
    if unknown:
        raise CoefficientsError(
            f"{path} has no expert '{unknown[0]}'", expected=f"one of {sorted(metadata['experts'])}", got=unknown[0]
        )
    try:
        vectors = TaskVectors(
            metadata["base"]["source"] if base is None else base,
            {task: moved.get(task, entry["source"]) for task, entry in metadata["experts"].items()},
            [build(spec, Transform, plugins) for spec in metadata["transforms"]],
            metadata["include"],
            metadata["exclude"],
            metadata["states"],
        )
        factory = build_factory(metadata["parametrization"], Parametrization, plugins)
        parametrization: Parametrization = factory(vectors)
        parametrization.load_values(values)
        layout = Layout(
            str(metadata["layout"]["weights"]), {str(k): str(v) for k, v in metadata["layout"]["files"].items()}
        )
        dtype = getattr(torch, metadata["dtype"])
    except AdamergeError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CoefficientsError(f"{path}: the recipe does not fit the values: {error}") from error
    if verify:
        _compare_fingerprints(path, metadata, vectors)
    return Coefficients(vectors, parametrization, layout, dtype, metadata["step"], metadata["protocol"])


def read_coefficients(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The file's metadata and its raw values by group, without opening any model.

    Raises:
        CoefficientsError: not a coefficient file, another version, unknown or missing fields, or non-finite values.

    """
    try:
        file = TensorFile(path)
    except AdamergeError as error:
        raise CoefficientsError(
            error.what, where=path, expected=error.expected, got=error.got, todo=error.todo
        ) from error
    try:
        metadata = json.loads(file.metadata[METADATA_KEY])
        found = metadata["format"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CoefficientsError(f"{path} is not a coefficient file: no '{METADATA_KEY}' metadata") from error
    if found != FORMAT:
        raise CoefficientsError(f"{path}: unknown format version", expected=FORMAT, got=found, todo="update adamerge")
    if metadata.keys() != FIELDS:
        raise CoefficientsError(f"{path}: unknown or missing fields {sorted(FIELDS ^ metadata.keys())}")
    values = {}
    for name, info in file.tensors.items():
        section, _, group = name.partition("/")
        if section != "w" or info.dtype != "F32" or len(info.shape) != 2:
            raise CoefficientsError(
                f"{path}: unexpected tensor '{name}'",
                expected="w/<group>, F32, (experts, n)",
                got=f"{info.dtype} {info.shape}",
            )
        values[group] = file.read(name)
        if not torch.isfinite(values[group]).all():
            raise CoefficientsError(f"{path}: '{name}' holds NaN or infinity")
    return metadata, values


def describe(part: Any) -> Any:
    """A part as plain data: ``{"class_path", "init_args"}``; its constructor's arguments are its attributes of that name."""
    if isinstance(part, str | int | float | bool | None):
        return part
    if isinstance(part, list | tuple):
        return [describe(item) for item in part]
    if isinstance(part, functools.partial):
        return {"class_path": _public_path(part.func), "init_args": {k: describe(v) for k, v in part.keywords.items()}}
    names = [name for name in inspect.signature(type(part)).parameters if name != "task_vectors"]
    return {
        "class_path": _public_path(type(part)),
        "init_args": {name: describe(getattr(part, name)) for name in names},
    }


def build(spec: Any, kind: type, plugins: Sequence[str] = ()) -> Any:
    """The part that ``describe`` described.

    Raises:
        CoefficientsError: its class is not a ``kind``, or not of ``adamerge`` or an allowed prefix.

    """
    return build_factory(spec, kind, plugins)()


def build_factory(spec: Any, kind: type, plugins: Sequence[str] = ()) -> Callable[..., Any]:
    """Like ``build``, before the call."""
    class_path = spec["class_path"]
    module, _, name = class_path.rpartition(".")
    if not any(f"{module}.".startswith(f"{prefix.rstrip('.')}.") for prefix in ("adamerge", *plugins)):
        raise CoefficientsError(
            f"the recipe names '{class_path}', which is not part of adamerge",
            todo=f"if you trust it, pass --allow-plugins {module.split('.')[0]}",
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CoefficientsError(f"the recipe names '{class_path}', which does not exist: {error}") from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise CoefficientsError(f"the recipe names '{class_path}', which is not a {kind.__name__}")
    arguments = {}
    for key, value in spec["init_args"].items():
        nested = isinstance(value, dict) and value.keys() == {"class_path", "init_args"}
        arguments[key] = _nested(value, plugins) if nested else value
    return functools.partial(found, **arguments)


def _nested(spec: Any, plugins: Sequence[str]) -> Any:
    """A part inside a part: another parametrization stays a factory, everything else is built."""
    factory = build_factory(spec, object, plugins)
    kind = factory.func  # type: ignore[attr-defined]
    if not issubclass(kind, BUILDABLE):
        raise CoefficientsError(f"the recipe names '{spec['class_path']}', which is not a part of a recipe")
    return factory if issubclass(kind, Parametrization) else factory()


def _public_path(kind: Any) -> str:
    """The shortest module path under which a class can be imported."""
    name, parts = kind.__qualname__, kind.__module__.split(".")
    for length in range(1, len(parts)):
        module = ".".join(parts[:length])
        if getattr(importlib.import_module(module), name, None) is kind:
            return f"{module}.{name}"
    return f"{kind.__module__}.{name}"


def _compare_fingerprints(path: Path, metadata: Mapping[str, Any], vectors: TaskVectors) -> None:
    models = [("the base", metadata["base"], vectors.base)]
    models += [(f"expert '{task}'", metadata["experts"][task], vectors.checkpoints[task]) for task in vectors.experts]
    for who, entry, checkpoint in models:
        if checkpoint.fingerprint != entry["fingerprint"]:
            raise CoefficientsError(
                f"{path}: {who} at {checkpoint.location} is not the model these coefficients were learned for",
                expected=f"fingerprint {entry['fingerprint'][:16]}…",
                got=f"{checkpoint.fingerprint[:16]}…",
                todo="point to it with --base or --expert NAME=PATH, or accept the difference with --allow-other-models",
            )
