"""Notices: what a fit tells of its data before it begins, a line each."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from adamerge.data.calibration_rows import sizes
from adamerge.data.held_out import calibration_splits

if TYPE_CHECKING:
    from adamerge.data.base import Calibration


def notices(data: Calibration, experts: Collection[str]) -> list[str]:
    """Tells how many samples each split has and where they come from, what is left out, and what cannot be used.

    Args:
        data: of the fit.
        experts: names of those that are merged; a task that has none of its own is told of.
    """
    lines = [f"{task}: {sizes(data, task)}" for task in data.fitted]
    for task in data.fitted:
        if experts and task not in experts:
            lines.append(
                f"{task}: calibrated on, though no expert of that name is merged;"
                " --leave_out takes experts alone, --tasks narrows experts and data"
            )
    scored = [(task, split) for split in ("validation", "test") for task in data.labelled_tasks(split)]
    odd = [data.labelling.oddity(data.rows(*which), data.label_place(*which)) for which in scored]
    skipped = [line for split in (*calibration_splits(data), "validation") for line in data.skipped_lines(split)]
    return [*lines, *skipped, *filter(None, odd)]
