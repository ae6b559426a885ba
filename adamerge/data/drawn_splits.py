"""Drawing: the splits that a data set lacks, disjoint, from its rows for training."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import torch


def draw(rows: datasets.Dataset, shares: Mapping[str, float], seed: int) -> dict[str, datasets.Dataset]:
    """Splits by a seeded permutation of the rows, one behind the other, and what is left as ``train``.

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
