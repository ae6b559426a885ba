"""Columns of paths: pictures that a table names, found beside it and opened when they are needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adamerge.errors import DataError

if TYPE_CHECKING:
    import datasets


def as_pictures(
    rows: datasets.Dataset,
    column: str,
    roots: Callable[[], Sequence[Path]],
    *,
    task: str,
    dataset: str,
    todo: str = "mend the paths",
) -> datasets.Dataset:
    """Returns the rows with a column of paths, or of the bytes of files, as pictures; others as they are.

    A relative path starts from the first of ``roots`` where it leads to a file: the folder of the file that names it
    comes first. Absolute paths, and such as leave the folder, are taken as they are, since the file is the user's own; of a
    data set of the Hub, which has no folder, no path is opened. Nothing is downloaded. A row without a path keeps none.

    Args:
        rows: of a split.
        column: of the pictures.
        roots: gives the folders that relative paths may start from.
        task: its name, for errors.
        dataset: as the user calls it, likewise.
        todo: what to do about pictures that do not exist.

    Raises:
        DataError: a picture is not there, or the column holds neither pictures nor paths.
    """
    from datasets import Image, Value

    where = f"task '{task}': {dataset}"
    feature = rows.features.get(column)
    if isinstance(feature, Value) and feature.dtype in {"binary", "large_binary"}:
        return rows.cast_column(column, Image())
    if isinstance(feature, dict) and feature.keys() == {"bytes", "path"}:
        return rows.cast_column(column, Image())
    if not isinstance(feature, Value):
        return rows
    folders = roots() if feature.dtype in {"string", "large_string"} else []
    if not folders:
        raise DataError(
            f"{where}: column '{column}' holds no pictures",
            expected="pictures, or in a file on this machine their paths",
            got=feature.dtype,
            todo="name the column of the pictures as image_column",
        )
    given = list(rows[column])
    for number, path in enumerate(given):
        if path is not None and re.match(r"[a-z0-9+]+://", path, re.IGNORECASE):
            raise DataError(
                f"{where}: row {number} names a picture by an address, {path[:200]}, and nothing is downloaded",
                todo="download the pictures, and give their paths",
            )
    files = [None if path is None else _file_of(path, folders) for path in given]
    missing = [file for file in files if file is not None and not file.is_file()]
    if missing:
        raise DataError(
            f"task '{task}': {len(missing)} of {len(files)} images of {dataset} do not exist, first {missing[0]}",
            todo=todo,
        )
    paths = [None if file is None else str(file) for file in files]
    rows = rows.remove_columns(column).add_column(column, paths)
    return rows.cast_column(column, Image())


def _file_of(path: str, roots: Sequence[Path]) -> Path:
    """Returns where a path leads: from the first folder where there is such a file, else from the first of all."""
    files = [root / path for root in roots]
    return next((file for file in files if file.is_file()), files[0])
