"""Held-out inputs: a seeded share of a task's calibration inputs, which no step of a fit sees; by them a step is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from adamerge.errors import DataError

if TYPE_CHECKING:
    import datasets

    from adamerge.data.base import Calibration

CALIBRATION, HELD_OUT = "calibration", "held_out"
"""What the calibration inputs of a fit are divided into: those that its steps see, and those that are held out."""
FEWEST = 32
"""Inputs of a task that are held out at least: the standard error of a share of them is at most 9 %."""


def divided(rows: datasets.Dataset, share: float, task: str, seed: int) -> dict[str, datasets.Dataset]:
    """Returns a task's calibration rows, divided into those of the steps and those held out, each in their former order.

    Args:
        rows: all that a fit may use.
        share: that is held out, but ``FEWEST`` rows where that is more, and half of them where that is less; of 0 none are.
        task: whose rows they are.
        seed: of the draw.

    Raises:
        DataError: a single row shall be divided.
    """
    if not share:
        return {CALIBRATION: rows}
    count = min(max(round(share * len(rows)), FEWEST), len(rows) // 2)
    if count < 1:
        raise DataError(
            f"task '{task}': none of its calibration inputs can be held out",
            expected="at least 2, one for the steps of a fit and one to choose a step by",
            got=len(rows),
            todo="give more, or set data.held_out=0",
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return {CALIBRATION: rows.select(sorted(order[count:])), HELD_OUT: rows.select(sorted(order[:count]))}


def calibration_splits(data: Calibration) -> tuple[str, ...]:
    """Returns the names of what the calibration inputs of data are divided into."""
    return (CALIBRATION, HELD_OUT) if data.held_out else (CALIBRATION,)
