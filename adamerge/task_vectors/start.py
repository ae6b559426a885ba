"""A start that is not the base: one more task vector, with fixed coefficient 1, from a file of deltas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.opening import open_checkpoint, opening
from adamerge.errors import CheckpointError
from adamerge.io.untrusted_files import listed, quoted

StartOf = Callable[[str], Callable[[], Tensor] | None]
"""Gives for the name of a tensor what reads the start's delta of it; None where there is none."""


def no_start(name: str) -> None:
    """Gives no delta of any tensor: the start is the base."""
    return


def open_start(source: str | Path, base: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """Opens a file of task vectors whose deltas are added to the base, whatever the coefficients are.

    Args:
        source: the file.
        base: the model that its deltas are of.
        names: of the tensors that are merged.

    Raises:
        CheckpointError: it holds no task vectors, or has a delta of a tensor that the base lacks, has in another shape, or
            that is not merged.
    """
    with opening("start"):
        start = open_checkpoint(source, base)
        deltas = [name for name in start if start.delta(name) is not None]
        if not deltas:
            raise CheckpointError(
                f"{quoted(str(source))} holds no task vectors",
                expected="deltas to the base by its names, as a solver writes them",
                got="a model",
                todo="run a stage with a solver, and name its file; or name the model as an expert",
            )
        others = sorted(set(deltas).difference(names))
        if others:
            raise CheckpointError(
                f"{quoted(str(source))} changes {len(others)} tensors that are not merged: {listed(others)}",
                where=start.location,
                todo="give both stages the same experts, include and exclude",
            )
    return start
