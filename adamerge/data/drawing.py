"""Drawing: the splits that a data set lacks, disjoint, from its rows for training."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import torch

from adamerge.errors import ConfigError


def draw(rows: datasets.Dataset, shares: Mapping[str, float], seed: int, where: str) -> dict[str, datasets.Dataset]:
    """Splits by a seeded permutation of the rows, one behind the other, and what is left as ``train``.

    Args:
        rows: for training.
        shares: split to the share of the rows that it gets.
        seed: of the permutation.
        where: task, for errors.

    Raises:
        ConfigError: the shares leave nothing.
    """
    if sum(shares.values()) >= 1:
        raise ConfigError(
            f"{where}: the shares of {', '.join(shares)}, which are drawn, must sum to less than 1",
            got=" + ".join(f"{share:g}" for share in shares.values()),
            todo=f"lower {' or '.join(f'data.{split}_fraction' for split in shares)}, or give the splits as files",
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    splits, start = {}, 0
    for split, share in shares.items():
        end = start + round(len(rows) * share)
        splits[split] = rows.select(order[start:end])
        start = end
    return splits | {"train": rows.select(order[start:])}
