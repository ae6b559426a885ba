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
from adamerge.runs.instantiate import Configured
from adamerge.solvers.sequential import SequentialSolver
from adamerge.solvers.solving import write_task_vectors
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.costs import Costs
from adamerge.training.solver_inputs import SampledInputs


def solve(coefficients: Coefficients, fit: Configured, folder: Path, costs: Costs) -> Coefficients:
    """Writes the task vectors of a solver into a run's folder, in which a solve that was killed goes on.

    Args:
        coefficients: of the method as it would be without a solver.
        fit: with the solver, the data that it may see, and the trainer's settings; a GPU is used where there is one, unless
            the accelerator is ``cpu``.
        folder: of the run.
        costs: of the stage; its forward passes are counted.

    Returns:
        Coefficients that add nothing: to one task vector of all, which is their start; or to the base, beside components.

    Raises:
        AdamergeError: as ``write_task_vectors``.
    """
    merging, trainer = fit.model.merging, fit.settings.trainer
    solver, vectors = merging.solver, merging.task_vectors
    assert solver is not None
    device = torch.device("cuda" if str(trainer.accelerator) != "cpu" and torch.cuda.is_available() else "cpu")
    target = folder / FOLDER / f"{solver.file}.safetensors"
    shown = iter if trainer.enable_progress_bar is False else _with_bar
    inputs, protocol = None, coefficients.protocol
    if isinstance(solver, SequentialSolver):
        inputs = SampledInputs(merging.backbone, vectors, fit.datamodule, samples=solver.samples, device=device)
        costs.watch(inputs.merged)
        protocol = inputs.protocol
    write_task_vectors(
        target,
        solver,
        vectors.to(device),
        recipe=describe(solver),
        transforms=[describe(one) for one in vectors.transforms],
        protocol=protocol,
        inputs=inputs,
        shown=shown,
    )
    start, components = (target, None) if solver.single else (None, target)
    models = vectors.base, vectors.checkpoints
    solved = TaskVectors(*models, include=vectors.include, exclude=vectors.exclude, start=start, components=components)
    return replace(coefficients, task_vectors=solved, parametrization=StartAlone(solved), protocol=protocol)


def _with_bar(names: Sequence[str]) -> Iterator[str]:
    tensors: Iterable[str] = track(names, description="solving", transient=True)
    yield from tensors
