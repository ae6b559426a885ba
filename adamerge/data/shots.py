"""Shots: a few samples of every class, drawn by a seed; more of them contain fewer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING

import torch

from adamerge.data.class_labels import LabelPlace, classes_of
from adamerge.errors import DataError

if TYPE_CHECKING:
    import datasets


def draw_shots(
    rows: datasets.Dataset, where: LabelPlace, each: int, seed: int, usable: Callable[[int], bool] | None = None
) -> list[int]:
    """Returns the numbers of ``each`` rows of every class, class by class, drawn at random.

    Args:
        rows: of a calibration split.
        where: task, split and column of the labels, and the classes.
        each: number of rows of a class.
        seed: of the order in which they are drawn.
        usable: whether the row of a number can be a sample; another is drawn in place of one that cannot. All when None.

    Raises:
        DataError: a class has too few rows, or a label is no class.
    """
    labels = classes_of(rows, where)
    by_class: list[list[int]] = [[] for _ in where.classnames]
    for number in torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist():
        by_class[labels[number]].append(number)
    chosen: list[int] = []
    for label, drawn in enumerate(by_class):
        of_class = list(islice(drawn if usable is None else filter(usable, drawn), each))
        if len(of_class) < each:
            raise DataError(
                f"{where}: class {label} has fewer samples than shots",
                expected=f"at least {each}",
                got=len(of_class),
                todo="lower data.shots, or give more calibration samples",
            )
        chosen += of_class
    return chosen
