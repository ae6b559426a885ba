"""Columns of paths: pictures that a table names, found beside it and opened when they are needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets

from adamerge.errors import DataError


def as_pictures(
    rows: datasets.Dataset,
    column: str,
    roots: Callable[[], Sequence[Path]],
    task: str,
    dataset: str,
    todo: str = "mend the paths",
) -> datasets.Dataset:
    """The rows with a column of paths, or of the bytes of files, as pictures; others as they are.

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
    where = f"task '{task}': {dataset}"
    feature = rows.features.get(column)
    if isinstance(feature, datasets.Value) and feature.dtype in {"binary", "large_binary"}:
        return rows.cast_column(column, datasets.Image())
    if isinstance(feature, dict) and feature.keys() == {"bytes", "path"}:
        return rows.cast_column(column, datasets.Image())
    if not isinstance(feature, datasets.Value):
        return rows
    places = roots() if feature.dtype in {"string", "large_string"} else []
    if not places:
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
    found = [None if path is None else _place(path, places) for path in given]
    missing = [place for place in found if place is not None and not place.is_file()]
    if missing:
        raise DataError(
            f"task '{task}': {len(missing)} of {len(found)} images of {dataset} do not exist, first {missing[0]}",
            todo=todo,
        )
    paths = [None if place is None else str(place) for place in found]
    rows = rows.remove_columns(column).add_column(column, paths)
    return rows.cast_column(column, datasets.Image())


def _place(path: str, roots: Sequence[Path]) -> Path:
    places = [root / path for root in roots]
    return next((place for place in places if place.is_file()), places[0])
