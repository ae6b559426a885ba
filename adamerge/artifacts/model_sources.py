"""The models of a coefficient file: where they are now, and whether they are those that it was learned for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.opening import lasting_path
from adamerge.checkpoints.origins import LOCAL
from adamerge.errors import CoefficientsError
from adamerge.io.run_folder import CONFIG, STAGES, run_of
from adamerge.task_vectors.task_vectors import Source, TaskVectors

RUN = "run:"
"""A model inside the folder of a run is called this, followed by its path there: such a run can be moved as a whole."""


def written_source(path: Path, model: Checkpoint) -> str:
    """Returns what a coefficient file says of where a model is: by the run that both lie in, else wherever one stands.

    Args:
        path: of the file; the run is the folder that it lies in, or for a stage the one above.
        model: which.
    """
    run, place = run_of(path), Path(os.path.abspath(model.location))
    began = (run / STAGES).is_file() or (run / CONFIG).is_file()
    if began and model.sources == (place,) and place.is_relative_to(run):
        return RUN + place.relative_to(run).as_posix()
    return lasting_path(model.location)


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
    if written.startswith(RUN):
        inside, folder = written.removeprefix(RUN), path if path.is_dir() else path.parent
        # of a stage's file the run is the folder above; the last stage's is copied into the run's own
        for run in (folder, folder.parent):
            if (run / inside).is_file():
                return str(run / inside)
        raise CoefficientsError(
            f"{path}: {who} is not there: it was written as '{inside}' in the folder of its run",
            todo=f"keep the file in the run's folder, or point to the model with {option}",
        )
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
    models += [(f"the {which}", metadata[which], file) for which, file in vectors.files.items()]
    for who, entry, checkpoint in models:
        if checkpoint.fingerprint != entry["fingerprint"]:
            raise CoefficientsError(
                f"{path}: {who} at {checkpoint.location} is not the model these coefficients were learned for",
                expected=f"fingerprint {entry['fingerprint'][:16]}…",
                got=f"{checkpoint.fingerprint[:16]}…",
                todo="point to it with --base, --expert NAME=PATH, --start or --components, "
                "or accept it with --allow-other-models",
            )
