"""The models of a coefficient file: where they are now, and whether they are those that it was learned for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adamerge.checkpoints.origins import LOCAL
from adamerge.errors import CoefficientsError
from adamerge.task_vectors.task_vectors import Source, TaskVectors


def source_of(path: Path, who: str, option: str, written: str, given: Source | None) -> Source:
    """Returns where a model of a coefficient file is: as given, else as written.

    Args:
        path: of the file.
        who: the model is.
        option: of the command line that points to it.
        written: what the file says.
        given: what a user says; None where the file decides.

    Raises:
        CoefficientsError: neither says it.
    """
    if given is not None:
        return given
    if written.startswith(LOCAL):
        raise CoefficientsError(
            f"{path} does not say where {who} is, since it lies in an exported folder",
            expected=f"'{written.removeprefix(LOCAL)}', as it was called there",
            got="no path",
            todo=f"point to it with {option}",
        )
    return written


def check_buffers(buffers: Mapping[str, Tensor], vectors: TaskVectors) -> None:
    """Checks whether the buffers of a coefficient file can take the place of the base's.

    Args:
        buffers: on-disk name to values.
        vectors: base and experts.

    Raises:
        ValueError: one is none of the base's floating-point tensors, is merged, or has another shape.
    """
    for name, value in buffers.items():
        if name not in vectors.base or name in vectors or not vectors.base.dtype(name).is_floating_point:
            raise ValueError(f"buffer '{name}' is no floating-point tensor of the base that is not merged")
        if vectors.base.shape(name) != value.shape:
            raise ValueError(f"buffer '{name}' is {tuple(value.shape)}, in the base {tuple(vectors.base.shape(name))}")


def check_fingerprints(path: Path, metadata: Mapping[str, Any], vectors: TaskVectors) -> None:
    """Checks whether the opened models are those that the coefficients of a file were learned for; reads every weight once.

    Args:
        path: of the file.
        metadata: of the file.
        vectors: base and experts, opened.

    Raises:
        CoefficientsError: they are not, by the first that is not.
    """
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
