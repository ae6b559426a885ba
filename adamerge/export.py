"""Export: the merged model as a folder that other libraries load, written one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import ModelCardData
from torch import Tensor

import adamerge
from adamerge.checkpoint import FORMAT_NAMES
from adamerge.coefficients import Coefficients, save_coefficients
from adamerge.errors import CoefficientsError, ExportError
from adamerge.files import TensorFile, quoted
from adamerge.merged_model import merged_tensor
from adamerge.staging import staged_folder

COEFFICIENTS_FILE = "adamerge_coefficients.safetensors"


def export(
    coefficients: Coefficients, target: str | Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
) -> Path:
    """Write the merged model to folder ``target``: weights, configuration, card and coefficients.

    Staged beside the target, re-read and compared, then renamed: the folder is complete or not there. Needs memory for
    a few tensors, never for a model.

    Args:
        coefficients: what ``load_coefficients`` gives.
        target: the new folder.
        dtype: of the floating-point tensors; by default that of the merged copy the coefficients were learned on.
        overwrite: replace an existing folder, which stays until the new one is complete.

    Raises:
        ExportError: the target exists, cannot be written, or does not read back as it was written.
        CheckpointError: a model's weights cannot be read, are not finite, or changed since they were opened.
    """
    vectors = coefficients.task_vectors
    models = [vectors.base, *vectors.checkpoints.values()]
    for name in (coefficients.layout.weights, *coefficients.layout.files):
        if Path(name).name != name or name in {"", ".", ".."} or not (name.isascii() and name.isprintable()):
            raise CoefficientsError(
                f"the coefficient file names an unsafe file {quoted(name)}", expected="a plain file name"
            )
    inputs = [source for model in models for source in (*model.sources, Path(model.location)) if source.exists()]
    with staged_folder(Path(target), overwrite=overwrite, inputs=inputs) as folder:
        for model in models:
            model.check()
        weights = folder / coefficients.layout.weights
        written = _write_weights(weights, coefficients, dtype or coefficients.dtype)
        for name, content in coefficients.layout.files.items():
            (folder / name).write_text(content, encoding="utf-8")
        save_coefficients(coefficients, folder / COEFFICIENTS_FILE)
        (folder / "README.md").write_text(card(coefficients), encoding="utf-8")
        for model in models:
            model.check()  # again: nothing may have changed while it was read
        verify(weights, written)
    return Path(target)


def merged_tensors(coefficients: Coefficients, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the merged model by on-disk name, one at a time; what is not merged is the base's."""
    vectors = coefficients.task_vectors
    with torch.no_grad():
        for name in vectors.base:
            base = vectors.base[name]
            if name in vectors:
                yield name, merged_tensor(base, coefficients.parametrization(name, vectors[name]), dtype)
            else:
                yield name, base.to(dtype) if base.is_floating_point() else base


def _write_weights(path: Path, coefficients: Coefficients, dtype: torch.dtype) -> dict[str, str]:
    """A safetensors file, streamed: the header follows from the base's, so nothing waits in memory.

    Returns:
        sha256 of every tensor's bytes, as computed, by name.
    """
    base = coefficients.task_vectors.base
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in base:
        stored = dtype if base.dtype(name).is_floating_point else base.dtype(name)
        start, end = end, end + base.shape(name).numel() * stored.itemsize
        header[name] = {"dtype": FORMAT_NAMES[stored], "shape": list(base.shape(name)), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hashes = {}
    try:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, tensor in merged_tensors(coefficients, dtype):
                hashes[name] = _write_tensor(file, tensor)
    except OSError as error:
        raise ExportError(
            f"cannot write {path}: {error.strerror}", todo="free space there, or choose another target"
        ) from error
    return hashes


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write_tensor(file: BinaryIO, tensor: Tensor) -> str:
    content = _bytes(tensor)
    file.write(content)
    return hashlib.sha256(content).hexdigest()


def verify(path: Path, hashes: dict[str, str]) -> None:
    """Open what was written as a stranger would, and compare every tensor with what was computed."""
    file = TensorFile(path)
    if file.tensors.keys() != hashes.keys():
        raise ExportError(f"{path.name} does not read back: {sorted(file.tensors.keys() ^ hashes.keys())[:10]}")
    for name, expected in hashes.items():
        if hashlib.sha256(_bytes(file.read(name))).hexdigest() != expected:
            raise ExportError(f"{path.name}: '{name}' does not read back as it was written", todo="check the disk")


def card(coefficients: Coefficients) -> str:
    """The README of an exported folder."""
    vectors = coefficients.task_vectors
    data = ModelCardData(
        base_model=[vectors.base.location],
        base_model_relation="merge",
        tags=["merge", "adamerge"],
    )
    experts = "\n".join(
        f"- `{task}`: `{checkpoint.location}` (sha256 `{checkpoint.fingerprint[:16]}`){checkpoint.note}"
        for task, checkpoint in vectors.checkpoints.items()
    )
    table = coefficients.table()
    rows = "\n".join(
        f"| `{group}` | " + " | ".join(", ".join(f"{c:.4f}" for c in values[task]) for task in vectors.experts) + " |"
        for group, values in table.items()
    )
    protocol = "\n".join(f"- {key}: {value}" for key, value in coefficients.protocol.items()) or "- no data were used"
    return f"""---
{data.to_yaml()}
---
# Merged model

`{vectors.base.location}` (sha256 `{vectors.base.fingerprint[:16]}`) plus {len(vectors.checkpoints)} experts, merged by
{type(coefficients.parametrization).__name__} coefficients after {coefficients.step} steps, with adamerge
{adamerge.__version__}. `{COEFFICIENTS_FILE}` holds the coefficients and the recipe.

## Experts

{experts}

## Data

{protocol}

## Coefficients

| group | {" | ".join(vectors.experts)} |
|---|{"---|" * len(vectors.experts)}
{rows}
"""
