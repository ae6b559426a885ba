"""The coefficient file: learned values, the recipe that gives them meaning, and which models they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

import adamerge
from adamerge.errors import AdamergeError, CoefficientsError, ConfigError
from adamerge.files import TensorFile
from adamerge.layout import Layout
from adamerge.parametrizations import Parametrization
from adamerge.recipe import build, build_factory, describe
from adamerge.staging import staged_file
from adamerge.task_vectors import Source, TaskVectors
from adamerge.transforms import Transform

FORMAT = 1
METADATA_KEY = "adamerge"
DTYPES = ("float64", "float32", "bfloat16", "float16")
FIELDS: dict[str, type] = {
    "format": int,
    "version": str,
    "step": int,
    "base": dict,
    "experts": dict,
    "rows": list,
    "include": list,
    "exclude": list,
    "transforms": list,
    "states": list,
    "parametrization": dict,
    "dtype": str,
    "layout": dict,
    "protocol": dict,
    "digest": str,
}


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

    def check(self) -> None:
        """See whether the recipe can be written, before a fit and not after it.

        Raises:
            ConfigError: a part's constructor arguments are not attributes of the same name, or not plain data.
        """
        for part in (*self.task_vectors.transforms, self.parametrization):
            try:
                json.dumps(describe(part))
            except (AttributeError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"{type(part).__name__} cannot be written into a coefficient file: {error}",
                    todo="keep each constructor argument as an attribute of its name: a number, text, list or another part",
                ) from error

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
        "base": {"source": _lasting(vectors.base.location), "fingerprint": vectors.base.fingerprint},
        "experts": {
            task: {"source": _lasting(checkpoint.location), "fingerprint": checkpoint.fingerprint}
            for task, checkpoint in vectors.checkpoints.items()
        },
        "rows": list(vectors.experts),
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
    metadata["digest"] = _digest(metadata, values)
    with staged_file(Path(path)) as temporary:
        temporary.write_bytes(safetensors.torch.save(values, {METADATA_KEY: json.dumps(metadata)}))


def _lasting(location: str) -> str:
    """The path from wherever one stands; what is no path is as it was."""
    path = Path(location).expanduser()
    return str(path.absolute()) if path.exists() else location


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
        parametrization: Parametrization = build_factory(metadata["parametrization"], Parametrization, plugins)(vectors)
        if list(vectors.experts) != metadata["rows"]:
            raise ValueError(f"rows {metadata['rows']}, experts {list(vectors.experts)}")
        parametrization.load_values(values)
    except ConfigError as error:
        raise CoefficientsError(f"{path}: the recipe cannot be used: {error.what}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CoefficientsError(f"{path}: the recipe does not fit the values: {error}") from error
    if verify:
        _compare_fingerprints(path, metadata, vectors)
    layout = Layout(metadata["layout"]["weights"], metadata["layout"]["files"])
    dtype = getattr(torch, metadata["dtype"])
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
    _check_metadata(path, metadata)
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
    if metadata["digest"] != _digest(metadata, {f"w/{group}": value for group, value in values.items()}):
        raise CoefficientsError(
            f"{path} is damaged: its content does not match its digest", todo="restore it from a copy"
        )
    return metadata, values


def _digest(metadata: Mapping[str, Any], values: Mapping[str, Tensor]) -> str:
    """sha256 over everything in the file but itself."""
    rest = {key: value for key, value in metadata.items() if key != "digest"}
    found = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(values):
        found.update(json.dumps([name, list(values[name].shape)]).encode())
        found.update(values[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def _check_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Every field is there and of its kind."""
    if metadata.keys() != FIELDS.keys():
        raise CoefficientsError(f"{path}: unknown or missing fields {sorted(FIELDS.keys() ^ metadata.keys())}")
    for name, kind in FIELDS.items():
        if type(metadata[name]) is not kind:
            raise CoefficientsError(f"{path}: field '{name}'", expected=kind.__name__, got=repr(metadata[name])[:200])
    models = {"base": metadata["base"], **metadata["experts"]}
    for who, entry in models.items():
        if not (isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("source", "fingerprint"))):
            raise CoefficientsError(f"{path}: model '{who}'", expected="source and fingerprint", got=repr(entry)[:200])
    files = metadata["layout"].get("files")
    if not (
        isinstance(metadata["layout"].get("weights"), str)
        and isinstance(files, dict)
        and all(isinstance(content, str) for content in files.values())
    ):
        raise CoefficientsError(
            f"{path}: field 'layout'", expected="weights and files", got=repr(metadata["layout"])[:200]
        )
    texts = [*metadata["include"], *metadata["exclude"], *metadata["rows"]]
    if not all(isinstance(text, str) for text in texts):
        raise CoefficientsError(f"{path}: include, exclude and rows", expected="texts", got=repr(texts)[:200])
    if metadata["dtype"] not in DTYPES or metadata["step"] < 0:
        raise CoefficientsError(
            f"{path}: dtype or step", expected=f"one of {DTYPES}, 0 or more", got=(metadata["dtype"], metadata["step"])
        )


def _compare_fingerprints(path: Path, metadata: Mapping[str, Any], vectors: TaskVectors) -> None:
    models = [("the base", metadata["base"], vectors.base)]
    models += [
        (f"expert '{task}'", metadata["experts"][task], vectors.checkpoints[task]) for task in vectors.checkpoints
    ]
    for who, entry, checkpoint in models:
        if checkpoint.fingerprint != entry["fingerprint"]:
            raise CoefficientsError(
                f"{path}: {who} at {checkpoint.location} is not the model these coefficients were learned for",
                expected=f"fingerprint {entry['fingerprint'][:16]}…",
                got=f"{checkpoint.fingerprint[:16]}…",
                todo="point to it with --base or --expert NAME=PATH, or accept the difference with --allow-other-models",
            )
