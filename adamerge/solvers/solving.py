"""Solving: a model's tensors one after the other, into a file of task vectors that a killed solve goes on with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adamerge
from adamerge.errors import DivergedError
from adamerge.io.resumable_file import ResumableFile
from adamerge.io.safetensors_writer import Header, header_bytes
from adamerge.io.task_vector_file import EXPERTS, text_of
from adamerge.precision import exact
from adamerge.solvers.base import TaskVectorWriter
from adamerge.task_vectors.task_vectors import TaskVectors

Shown = Callable[[Sequence[str]], Iterable[str]]
"""Goes through the names of the tensors that are still to solve, and shows how far it is."""


def write_task_vectors(
    target: Path,
    solver: TaskVectorWriter,
    vectors: TaskVectors,
    *,
    recipe: Mapping[str, Any],
    transforms: Sequence[Mapping[str, Any]] = (),
    protocol: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    shown: Shown = iter,
) -> None:
    """Solves every tensor and writes the task vectors: deltas by on-disk names, and whose they are.

    One tensor of each expert is in memory at a time. A file that is there already, of the same recipe and models, stays; a
    solve that was killed goes on with the tensors that are done.

    Args:
        target: the file.
        solver: makes what the file has of each tensor.
        vectors: base, experts and transforms.
        recipe: of the solver, as plain data.
        transforms: of the vectors, as plain data.
        protocol: which data were used, and how; none when None.
        dtype: of the deltas in the file.
        shown: goes through the names of tensors, and shows how far it is.

    Raises:
        DivergedError: a tensor's delta is not finite, or the solver's system cannot be solved.
        ExportError: the file cannot be written.
        CheckpointError: a model cannot be read.
    """
    entries = {name: solver.entries(name, vectors) for name in vectors}
    header: Header = {key: (dtype, shape) for own in entries.values() for key, shape in own.items()}
    metadata = text_of(
        {
            "version": adamerge.__version__,
            "merged": solver.single,
            **({} if solver.single else {EXPERTS: list(vectors.experts)}),
            "solver": dict(recipe),
            "base": {"fingerprint": vectors.base.fingerprint},
            "experts_from": {task: {"fingerprint": own.fingerprint} for task, own in vectors.checkpoints.items()},
            "transforms": [dict(one) for one in transforms],
            "protocol": dict(protocol or {}),
        }
    )
    if _is_written(target, header_bytes(header, metadata)):
        return
    with ResumableFile(target, header, metadata) as file:
        done = set(list(header)[: file.done])
        for name in shown([name for name, own in entries.items() if not own.keys() <= done]):
            for key, tensor in zip(entries[name], solved(solver, name, vectors), strict=True):
                if key not in done:  # of several of a tensor's, a killed solve may have written some
                    file.add(tensor.to(dtype))
        file.finish()


def solved(solver: TaskVectorWriter, name: str, vectors: TaskVectors) -> Iterator[Tensor]:
    """Yields what the solver makes of one tensor, in fp32 whatever autocast says.

    Raises:
        DivergedError: it is not finite, or the solver's system cannot be solved.
    """
    made = solver.tensors(name, vectors[name])
    while (tensor := _next(made, solver, name, vectors.device)) is not None:
        yield tensor


def _next(made: Iterator[Tensor], solver: TaskVectorWriter, name: str, device: torch.device) -> Tensor | None:
    with torch.no_grad(), exact(device):
        try:
            delta = next(made, None)
        except torch.linalg.LinAlgError as error:
            raise DivergedError(
                f"{type(solver).__name__}: '{name}' cannot be solved: {error}",
                todo="choose a larger ridge, or look for experts that are not finite",
            ) from error
        if delta is not None and not torch.isfinite(delta).all():
            raise DivergedError(
                f"{type(solver).__name__}: the task vector of '{name}' became NaN or infinite",
                todo="choose other settings of the solver",
            )
    return delta


def _is_written(target: Path, begin: bytes) -> bool:
    """Returns whether the target begins with this header, which says what it was made of; it is there as a whole or not."""
    if not target.is_file():
        return False
    with target.open("rb") as file:
        return file.read(len(begin)) == begin
