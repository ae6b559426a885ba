"""Samples: the preprocessed rows of a split, each decoded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from adamerge.backbones import Inputs
from adamerge.errors import DataError


class Samples(Dataset[Inputs]):
    """Preprocessed samples of one split, each decoded at its first use and kept in memory.

    Args:
        rows: of the split.
        columns: that make a sample: of one, its value is preprocessed, of several, a mapping of them.
        preprocess: one decoded sample to tensors; images are all of one shape, sequences may differ in length.
        where: task and split, for errors.
        shared: keep samples that are one tensor in memory that worker processes share.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        columns: Sequence[str],
        preprocess: Callable[[Any], Inputs],
        where: str,
        shared: bool = False,
    ) -> None:
        # only these columns: the labels of unlabelled data are never read
        self.rows, self.columns = rows.select_columns(list(columns)), tuple(columns)
        self.preprocess, self.where = preprocess, where
        self._decoded: dict[int, Inputs] = {}
        self._shared: tuple[Tensor, Tensor] | None = None
        first = self._decoded[0] = self._decode(0)
        if shared and isinstance(first, Tensor):
            values = torch.empty(len(rows), *first.shape, dtype=first.dtype).share_memory_()
            self._shared = values, torch.zeros(len(rows), dtype=torch.bool).share_memory_()
            self._shared[0][0], self._shared[1][0] = first, True

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Inputs:
        index = int(index)
        if self._shared is not None and self._shared[1][index]:
            return self._shared[0][index]
        if index not in self._decoded:
            decoded, first = self._decode(index), self._decoded[0]
            if isinstance(first, Tensor) and isinstance(decoded, Tensor) and decoded.shape != first.shape:
                raise DataError(
                    f"{self.where}: row {index} has another shape than row 0 after preprocessing",
                    expected=tuple(first.shape),
                    got=tuple(decoded.shape),
                )
            if self._shared is not None and isinstance(decoded, Tensor):
                self._shared[0][index], self._shared[1][index] = decoded, True
                return decoded
            self._decoded[index] = decoded
        return self._decoded[index]

    def _decode(self, index: int) -> Inputs:
        try:
            row = self.rows[index]
            return self.preprocess(row[self.columns[0]] if len(self.columns) == 1 else row)
        except Exception as error:
            raise DataError(
                f"{self.where}: row {index} cannot be read: {error}", todo="remove the row, or repair the file"
            ) from error
