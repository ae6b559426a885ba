"""Components for tests: task vectors whose experts are read from a file of factors, as a stage writes it."""

from __future__ import annotations

from pathlib import Path

from adamerge.artifacts.recipe import describe
from adamerge.solvers import Components
from adamerge.solvers.solving import write_task_vectors
from adamerge.task_vectors.task_vectors import TaskVectors

OF_COMPONENTS = {"ComponentWise", "RankMask"}
"""Parametrizations that have coefficients or masks of components, and take no dense experts."""


def save_components(path: Path, vectors: TaskVectors, rank: float | None = None) -> Path:
    """Write the components of task vectors, after their transforms, and return the path."""
    solver = Components(rank)
    transforms = [describe(one) for one in vectors.transforms]
    write_task_vectors(path, solver, vectors, recipe=describe(solver), transforms=transforms)
    return path


def with_components(path: Path, vectors: TaskVectors, rank: float | None = None) -> TaskVectors:
    """The same base and experts, these as components from a file that is written for it."""
    save_components(path, vectors, rank)
    return TaskVectors(vectors.base, vectors.checkpoints, (), vectors.include, vectors.exclude, components=path)
