"""The coefficients as people see them: each one where there are few, else mean and spread of a tensor's, by expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adamerge.parametrizations import Parametrization

MOST = 10_000
"""Numbers of all experts and groups up to which tables, pictures and trackers have each; the file has all in any case."""


class Moments(NamedTuple):
    """What many coefficients are summarised to.

    Attributes:
        mean: of what multiplies the elements of an expert's task vector.
        spread: its standard deviation.
    """

    mean: float
    spread: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.spread:.4f}"


Cell = Sequence[float] | Moments
Table = Mapping[str, Mapping[str, Cell]]
"""Group name to expert name to the group's coefficients, or to what they are summarised to."""


def summarised(values: Mapping[str, Tensor]) -> bool:
    """Returns whether so many coefficients are shown by mean and spread: the one place that decides."""
    return sum(own.numel() for own in values.values()) > MOST


def coefficient_table(
    kind: type[Parametrization], coefficients: Mapping[str, Tensor], experts: Sequence[str]
) -> dict[str, dict[str, Cell]]:
    """Returns the table of coefficients.

    Args:
        kind: of the parametrization, which knows what multiplies a tensor's elements.
        coefficients: group name to ``(experts, coefficients of the group)``.
        experts: their names, in the order of the rows.
    """
    if not summarised(coefficients):
        return {
            group: {task: row.tolist() for task, row in zip(experts, own, strict=True)}
            for group, own in coefficients.items()
        }
    # one transfer from a device for each group, and no list of all numbers
    moments = {group: torch.stack(pair, dim=1).tolist() for group, pair in kind.moments(coefficients).items()}
    return {
        group: {task: Moments(*row) for task, row in zip(experts, rows, strict=True)} for group, rows in moments.items()
    }


def moments_of(cell: Cell) -> Moments:
    """Returns mean and spread of a cell's coefficients, of which there is at least one."""
    if isinstance(cell, Moments):
        return cell
    mean = sum(cell) / len(cell)
    return Moments(mean, (sum((one - mean) ** 2 for one in cell) / len(cell)) ** 0.5)


def text_of(cell: Cell) -> str:
    """Returns a cell as tables print it."""
    return str(cell) if isinstance(cell, Moments) else ", ".join(f"{one:.4f}" for one in cell)
