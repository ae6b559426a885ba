"""Row numbers: where a row stood in the file or split that it was read from, however it was drawn and shuffled since."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    import datasets

_NUMBER = "adamerge: row of "
"""Begins the name of the column that holds rows' numbers; it ends with the name of the split that was read."""


def numbered(rows: datasets.Dataset, split: str) -> datasets.Dataset:
    """Returns the rows of a split as read with their numbers, from 0 on, in a column that drawing and shuffling keep."""
    return rows.add_column(f"{_NUMBER}{split}", numpy.arange(len(rows)))


def is_number(column: str) -> bool:
    """Returns whether a column of this name holds the numbers of rows."""
    return column.startswith(_NUMBER)


def described(rows: datasets.Dataset, index: int, columns: Sequence[str] = ()) -> str:
    """Returns what finds a row in its file: ``row 17 (counted from 0) of split 'train', picture /data/a.png``.

    Args:
        rows: that were ``numbered``, else ``index`` itself is told.
        index: of the row among them.
        columns: of which those that hold pictures are told by the path of their file, where there is one.
    """
    from datasets import Image

    own = [name for name in rows.column_names if is_number(name)]
    numbers = rows.select_columns(own)[index] if own else {}
    told = f"row {index}"
    for column, number in numbers.items():
        if number is not None:  # rows of two splits that were joined have a column of each
            told = f"row {number} (counted from 0) of split '{column.removeprefix(_NUMBER)}'"
    for name in columns:
        if isinstance(rows.features[name], Image):
            stored = rows.select_columns([name]).cast_column(name, Image(decode=False))[index][name]
            if stored is not None and stored["path"]:
                told += f", picture {stored['path']}"
    return told
