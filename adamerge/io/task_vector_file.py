"""The task vector file: deltas as such, or factors of them, and what says whose they are; checked before they are used."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adamerge.errors import CheckpointError
from adamerge.io.coefficient_file import METADATA_KEY
from adamerge.io.safetensors_file import TensorFile
from adamerge.io.untrusted_files import quoted
from adamerge.io.unwritten import TASK_VECTORS
from adamerge.io.versions import refuse_later

FORMAT = 1
KIND = "task_vectors"
FOLDER = "task_vectors"
"""In the folder of a run."""
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
FIELDS: dict[str, type] = {
    "format": int,
    "kind": str,
    "version": str,
    "merged": bool,
    "solver": dict,
    "base": dict,
    "experts_from": dict,
    "transforms": list,
    "protocol": dict,
}
EXPERTS = "experts"
"""A field of files that hold several experts' vectors: their names, in order."""
FACTORS, DELTA = "factors", "delta"
"""Kinds of tensors in such a file, which are called EXPERT/KIND/NAME by the base's on-disk name: of a matrix the factors,
left ``(rows, n)`` above right ones transposed ``(columns, n)``; of what is no matrix the delta itself."""


def text_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Returns the metadata of a task vector file as the format writes them: one text under ``adamerge``.

    Args:
        metadata: values of all ``FIELDS`` but format and kind; of ``EXPERTS`` where the vectors are not merged.
    """
    return {METADATA_KEY: json.dumps({"format": FORMAT, "kind": KIND, **metadata})}


def is_task_vector_file(file: TensorFile) -> bool:
    """Returns whether a file says of itself that it holds task vectors, from its header alone."""
    return isinstance(metadata := _parsed(file), dict) and metadata.get("kind") == KIND


def holds_task_vectors(source: object) -> bool:
    """Returns whether what a configuration names as a model is a solver's file, written or yet to be.

    What is not there, or cannot be opened, counts where its folder is that of a run's task vectors: whoever opens it says
    what is wrong with it.
    """
    text = str(source)
    if TASK_VECTORS in text:
        return True
    path = Path(os.path.expanduser(text))
    try:
        if path.is_file():
            return is_task_vector_file(TensorFile(path))
    except (CheckpointError, OSError, ValueError):
        pass
    return path.parent.name == FOLDER


def task_vector_metadata(file: TensorFile) -> dict[str, Any]:
    """Returns the metadata of a file of task vectors.

    The tensors of one merged vector go by the base's on-disk names.

    Raises:
        CheckpointError: it holds no task vectors, is one of a later version, or a field is missing, unknown or not of its
            kind; or a tensor is no floating-point one.
    """
    metadata, path = _parsed(file), file.path
    if not isinstance(metadata, dict) or metadata.get("kind") != KIND:
        raise CheckpointError(f"{quoted(path)} holds no task vectors", todo="name a file that a solver has written")
    refuse_later(metadata.get("version"), path, CheckpointError)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{quoted(path)}: unknown format of task vectors",
            expected=FORMAT,
            got=metadata.get("format"),
            todo="update adamerge",
        )
    fields = FIELDS if metadata.get("merged") is not False else FIELDS | {EXPERTS: list}
    if metadata.keys() != fields.keys():
        odd = sorted(map(str, fields.keys() ^ metadata.keys()))
        raise CheckpointError(f"{quoted(path)}: unknown or missing fields {odd}", todo="solve again")
    for name, kind in fields.items():
        if type(metadata[name]) is not kind:
            raise CheckpointError(
                f"{quoted(path)}: field '{name}'", expected=kind.__name__, got=repr(metadata[name])[:200]
            )
    experts = metadata.get(EXPERTS, ["merged"])
    if not experts or not all(isinstance(expert, str) for expert in experts) or len({*experts}) < len(experts):
        raise CheckpointError(
            f"{quoted(path)}: field '{EXPERTS}'", expected="one name or more", got=repr(metadata[EXPERTS])[:200]
        )
    for who, entry in [("the base", metadata["base"]), *metadata["experts_from"].items()]:
        if not (isinstance(entry, dict) and isinstance(entry.get("fingerprint"), str)):
            raise CheckpointError(f"{quoted(path)}: model '{who}'", expected="a fingerprint", got=repr(entry)[:200])
    for name, info in file.tensors.items():
        if info.dtype not in FLOAT_TYPES:
            raise CheckpointError(
                f"{quoted(path)}: '{name}' is {info.dtype}, which is no task vector",
                expected=" or ".join(FLOAT_TYPES),
                got=info.dtype,
            )
    return metadata


def read_task_vectors(path: Path) -> dict[str, Any]:
    """Returns the metadata of the task vector file at a path.

    Raises:
        CheckpointError: as ``task_vector_metadata``, or it cannot be opened.
    """
    return task_vector_metadata(TensorFile(path))


def _parsed(file: TensorFile) -> Any:
    try:
        return json.loads(file.metadata[METADATA_KEY])
    except (KeyError, ValueError, RecursionError):
        return None
