"""The coefficient file as bytes: its sections, its metadata and its digest, checked before anything is made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.errors import AdamergeError, CoefficientsError
from adamerge.io.dtypes import FLOATS
from adamerge.io.model_folder import Layout
from adamerge.io.run_folder import COEFFICIENTS
from adamerge.io.safetensors_file import TensorFile
from adamerge.io.tensor_bytes import tensor_bytes
from adamerge.io.untrusted_files import quoted
from adamerge.io.versions import refuse_later

FORMAT = 2
"""Of what is written: since the second, parts go by public names. What is read may be any up to it."""
METADATA_KEY = "adamerge"
SECTIONS = ("w", "mask", "buffer")
DTYPES = ("float64", *FLOATS)
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
FILES = ("start", "components")
"""Fields of files whose coefficients begin from other than the base, or are of components: what else was read."""


Sections = dict[str, dict[str, Tensor]]
"""``w``: raw values before the constraint, group name to ``(experts, n)``; ``mask``: logits, tensor name to its shape;
``buffer``: recomputed values, tensor name to its shape."""


def read_coefficients(path: Path) -> tuple[dict[str, Any], Sections]:
    """Returns the file's metadata and its sections, without opening any model.

    Args:
        path: the file, or the folder of the run that it lies in.

    Raises:
        CoefficientsError: not a coefficient file, one of a later version, unknown or missing fields, or non-finite values.
    """
    if path.is_dir():
        if (path / "checkpoints").is_dir() and not (path / COEFFICIENTS).is_file():
            raise CoefficientsError(
                f"{path} has not ended, and so has no {COEFFICIENTS} yet",
                todo=f"go on with: adamerge fit --resume {path}",
            )
        path = path / COEFFICIENTS
    try:
        file = TensorFile(path)
    except AdamergeError as error:
        raise CoefficientsError(
            error.what, where=path, expected=error.expected, got=error.got, todo=error.todo
        ) from error
    try:
        metadata = json.loads(file.metadata[METADATA_KEY])
        written, version = metadata["format"], metadata["version"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CoefficientsError(f"{path} is not a coefficient file: no '{METADATA_KEY}' metadata") from error
    refuse_later(version, path, CoefficientsError)
    if written not in range(1, FORMAT + 1):
        raise CoefficientsError(
            f"{path}: unknown format, written by adamerge {quoted(version)}",
            expected=f"1 to {FORMAT}",
            got=written,
            todo="update adamerge",
        )
    _check_metadata(path, metadata)
    sections: Sections = {section: {} for section in SECTIONS}
    values = {}
    for name, info in file.tensors.items():
        section, _, rest = name.partition("/")
        if section not in SECTIONS or info.dtype != "F32" or (section == "w" and len(info.shape) != 2):
            raise CoefficientsError(
                f"{path}: unexpected tensor '{name}'",
                expected="w/<group>, F32, (experts, n); or mask/<tensor> or buffer/<tensor>, F32",
                got=f"{info.dtype} {info.shape}",
            )
        sections[section][rest] = values[name] = file.read(name)
        if not torch.isfinite(values[name]).all():
            raise CoefficientsError(f"{path}: '{name}' holds NaN or infinity")
    if metadata["digest"] != digest_of(metadata, values):
        raise CoefficientsError(
            f"{path} is damaged: its content does not match its digest", todo="restore it from a copy"
        )
    return metadata, sections


def digest_of(metadata: Mapping[str, Any], values: Mapping[str, Tensor]) -> str:
    """Returns the sha256 of everything in the file but itself."""
    rest = {key: value for key, value in metadata.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(values):
        digest.update(json.dumps([name, list(values[name].shape)]).encode())
        digest.update(tensor_bytes(values[name]))
    return digest.hexdigest()


def _check_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    """Refuses metadata of which a field is missing, unknown or not of its kind."""
    files = [which for which in FILES if which in metadata]
    fields = FIELDS | dict.fromkeys(files, dict)
    if metadata.keys() != fields.keys():
        raise CoefficientsError(f"{path}: unknown or missing fields {sorted(fields.keys() ^ metadata.keys())}")
    for name, kind in fields.items():
        if type(metadata[name]) is not kind:
            raise CoefficientsError(f"{path}: field '{name}'", expected=kind.__name__, got=repr(metadata[name])[:200])
    models = [("base", metadata["base"]), *metadata["experts"].items()]
    models += [(which, metadata[which]) for which in files]
    for who, entry in models:
        if not (isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("source", "fingerprint"))):
            raise CoefficientsError(f"{path}: model '{who}'", expected="source and fingerprint", got=repr(entry)[:200])
    if not _is_layout(metadata["layout"]):
        raise CoefficientsError(
            f"{path}: field 'layout'",
            expected="weights, files, copied, heads, copies and wide",
            got=repr(metadata["layout"])[:200],
        )
    try:
        json.dumps(metadata, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # half a letter, which no file could hold
        raise CoefficientsError(f"{path}: a text in it is no text: {error.reason}") from error
    texts = [*metadata["include"], *metadata["exclude"], *metadata["rows"]]
    if not all(isinstance(text, str) for text in texts):
        raise CoefficientsError(f"{path}: include, exclude and rows", expected="texts", got=repr(texts)[:200])
    if metadata["dtype"] not in DTYPES or metadata["step"] < 0:
        raise CoefficientsError(
            f"{path}: dtype or step", expected=f"one of {DTYPES}, 0 or more", got=(metadata["dtype"], metadata["step"])
        )


def plain_layout(layout: Layout) -> dict[str, Any]:
    """Returns the layout as JSON holds it."""
    return {
        "weights": layout.weights,
        "files": dict(layout.files),
        "copied": list(layout.copied),
        "heads": list(layout.heads),
        "copies": dict(layout.copies),
        "wide": list(layout.wide),
    }


def _is_layout(layout: Mapping[str, Any]) -> bool:
    """Returns whether every field is of its kind; files of the first versions have only weights and files."""

    def are_texts(values: Any, kind: type) -> bool:
        texts = values.values() if isinstance(values, dict) else values
        return isinstance(values, kind) and all(isinstance(text, str) for text in texts)

    kinds = {"files": dict, "copied": list, "heads": list, "copies": dict, "wide": list}
    return (
        {"weights", "files"} <= layout.keys() <= {"weights", *kinds}
        and isinstance(layout["weights"], str)
        and all(are_texts(layout[name], kind) for name, kind in kinds.items() if name in layout)
    )
