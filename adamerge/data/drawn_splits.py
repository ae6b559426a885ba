"""Drawing: the splits that a data set lacks, disjoint, from its rows for training; and some rows of many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from adamerge.errors import DataError

if TYPE_CHECKING:
    import datasets


def draw(rows: datasets.Dataset, shares: Mapping[str, float], seed: int) -> dict[str, datasets.Dataset]:
    """Returns splits by a seeded permutation of the rows, one behind the other, and what is left as ``train``.

    Args:
        rows: for training.
        shares: split to the share of the rows that it gets, or to what those before it leave, if that is less.
        seed: of the permutation.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    splits, start = {}, 0
    for split, share in shares.items():
        end = start + round(len(rows) * share)
        splits[split] = rows.select(order[start:end])
        start = end
    return splits | {"train": rows.select(order[start:])}


def draw_some(rows: datasets.Dataset, count: int, seed: int) -> datasets.Dataset:
    """Returns ``count`` of the rows, or all where there are fewer; a larger count contains a smaller one's."""
    generator = torch.Generator().manual_seed(seed)
    return rows.select(torch.randperm(len(rows), generator=generator)[:count].tolist())


def needed(splits: Mapping[str, datasets.Dataset], split: str, task: str) -> datasets.Dataset:
    """Returns the rows of a split that must be there.

    Raises:
        DataError: it is missing or empty.
    """
    rows = splits.get(split)
    if rows is None or len(rows) == 0:
        raise DataError(
            f"task '{task}': the {split} split is {'missing' if rows is None else 'empty'}",
            expected="at least one sample",
            got=f"splits { ({name: len(of_split) for name, of_split in splits.items()}) }",
            todo=f"give a {split} split or file, or more rows of train to draw it from",
        )
    return rows
