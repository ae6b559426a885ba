"""Solving: a model's tensors one after the other, into a file of task vectors that a killed solve goes on with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adamerge
from adamerge.errors import ConfigError, DivergedError
from adamerge.io.resumable_file import ResumableFile
from adamerge.io.safetensors_writer import Header, header_bytes
from adamerge.io.task_vector_file import EXPERTS, text_of
from adamerge.precision import exact
from adamerge.solvers.base import TaskVectorWriter
from adamerge.solvers.sequential import LinearInputs, Linears, SequentialSolver
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
    inputs: LinearInputs | None = None,
    shown: Shown = iter,
) -> None:
    """Solves every tensor and writes the task vectors: deltas by on-disk names, and whose they are.

    One tensor of each expert is in memory at a time, or those that share their inputs where a solver sees these. A file that
    is there already, of the same recipe and models, stays; a solve that was killed goes on with the tensors that are done.

    Args:
        target: the file.
        solver: makes what the file has of each tensor.
        vectors: base, experts and transforms.
        recipe: of the solver, as plain data.
        transforms: of the vectors, as plain data.
        protocol: which data were used, and how; none when None.
        dtype: of the deltas in the file.
        inputs: what enters the network's linear maps, for a solver that sees inputs.
        shown: goes through the names of tensors, and shows how far it is.

    Raises:
        ConfigError: the solver sees inputs and there are no inputs, or the other way round.
        DivergedError: a tensor's delta is not finite, or the solver's system cannot be solved.
        ExportError: the file cannot be written.
        CheckpointError: a model cannot be read.
    """
    if (inputs is not None) != solver.sees_inputs:
        raise ConfigError(
            f"{type(solver).__name__} {'needs' if solver.sees_inputs else 'takes no'} inputs of linear maps"
        )
    groups = {} if inputs is None else {tuple(group.names): group for group in _groups(vectors, inputs)}
    seen = {name for names in groups for name in names}
    units = [*((name,) for name in vectors if name not in seen), *groups]
    entries = {names: [solver.entries(name, vectors) for name in names] for names in units}
    keys = {names: [key for one in own for key in one] for names, own in entries.items()}
    header: Header = {key: (dtype, shape) for own in entries.values() for one in own for key, shape in one.items()}
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
        if inputs is not None:
            inputs.begin(file.reader)
        done = set(list(header)[: file.done])
        waiting = {names[-1]: names for names in units if not done.issuperset(keys[names])}
        for last in shown(list(waiting)):
            names = waiting[last]
            if isinstance(solver, SequentialSolver) and names in groups:
                made: Iterable[Tensor] = maps_solved(solver, groups[names]).values()
            else:
                made = solved(solver, last, vectors)
            for key, tensor in zip(keys[names], made, strict=True):
                if key not in done:  # of several that are made at once, a killed solve may have written some
                    file.add(tensor.to(dtype))
        file.finish()


def solved(solver: TaskVectorWriter, name: str, vectors: TaskVectors) -> Iterator[Tensor]:
    """Yields what the solver makes of one tensor, in fp32 whatever autocast says.

    Raises:
        DivergedError: it is not finite, or the solver's system cannot be solved.
    """
    made = solver.tensors(name, vectors)
    while True:
        with _whole(solver, name, vectors):
            delta = next(made, None)
            if delta is None:
                return
            _check(solver, {name: delta})
        yield delta


def maps_solved(solver: SequentialSolver, maps: Linears) -> dict[str, Tensor]:
    """Returns the solver's deltas of linear maps that share their inputs, by name, in fp32 whatever autocast says.

    Raises:
        DivergedError: one is not finite, or the solver's system cannot be solved.
    """
    with _whole(solver, maps.names[0], maps.vectors):
        toward = maps.matrix(lambda name: solver.solve(name, maps.vectors))
        deltas = maps.tensors(solver.solve_maps(maps, toward))
        _check(solver, deltas)
    return {name: deltas[name] for name in maps.names}


@contextmanager
def _whole(solver: TaskVectorWriter, name: str, vectors: TaskVectors) -> Iterator[None]:
    """Computes in fp32 and without gradients, and says which tensor it is that cannot be solved."""
    with torch.no_grad(), exact(vectors.device):
        try:
            yield
        except torch.linalg.LinAlgError as error:
            raise DivergedError(
                f"{type(solver).__name__}: '{name}' cannot be solved: {error}",
                todo="choose a larger ridge, or look for experts that are not finite",
            ) from error


def _check(solver: TaskVectorWriter, deltas: Mapping[str, Tensor]) -> None:
    for name, delta in deltas.items():
        if not torch.isfinite(delta).all():
            raise DivergedError(
                f"{type(solver).__name__}: the task vector of '{name}' became NaN or infinite",
                todo="choose other settings of the solver",
            )


def _groups(vectors: TaskVectors, inputs: LinearInputs) -> Iterator[Linears]:
    """Yields the network's linear maps that are merged, in its order; a bias that is not merged is the same in all models."""
    for group in inputs.groups:
        own = [one._replace(bias=one.bias if one.bias in vectors else None) for one in group if one.weight in vectors]
        for biased in (True, False):  # of some the bias may be merged and of others not
            alike = tuple(one for one in own if (one.bias is not None) == biased)
            if alike:
                yield Linears(alike, vectors, inputs)


def _is_written(target: Path, begin: bytes) -> bool:
    """Returns whether the target begins with this header, which says what it was made of; it is there as a whole or not."""
    if not target.is_file():
        return False
    with target.open("rb") as file:
        return file.read(len(begin)) == begin
