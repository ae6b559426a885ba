"""A stage with a solver: its task vectors in the run's folder, and the coefficients that merge them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import track

from adamerge.artifacts.coefficients import Coefficients
from adamerge.artifacts.recipe import describe
from adamerge.io.task_vector_file import FOLDER
from adamerge.parametrizations import StartAlone
from adamerge.solvers.solving import write_task_vectors
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.merging import Merging


def solve(
    coefficients: Coefficients, merging: Merging, folder: Path, *, accelerator: str, progress: bool
) -> Coefficients:
    """Writes the task vectors of a solver into a run's folder, in which a solve that was killed goes on.

    Args:
        coefficients: of the method as it would be without a solver.
        merging: the method.
        folder: of the run.
        accelerator: of the trainer; a GPU is used where there is one, unless it is ``cpu``.
        progress: whether a bar is shown.

    Returns:
        Coefficients that add nothing: to one task vector of all, which is their start; or to the base, beside components.

    Raises:
        AdamergeError: as ``write_task_vectors``.
    """
    assert merging.solver is not None
    vectors = merging.task_vectors
    device = "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"
    solver = merging.solver
    target = folder / FOLDER / f"{solver.file}.safetensors"
    shown = _with_bar if progress else iter
    write_task_vectors(
        target,
        solver,
        vectors.to(device),
        recipe=describe(solver),
        transforms=[describe(one) for one in vectors.transforms],
        shown=shown,
    )
    start, components = (target, None) if solver.single else (None, target)
    models = vectors.base, vectors.checkpoints
    solved = TaskVectors(*models, include=vectors.include, exclude=vectors.exclude, start=start, components=components)
    return replace(coefficients, task_vectors=solved, parametrization=StartAlone(solved))


def _with_bar(names: Sequence[str]) -> Iterator[str]:
    tensors: Iterable[str] = track(names, description="solving", transient=True)
    yield from tensors
