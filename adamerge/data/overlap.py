"""Overlap: samples that are calibration data and in the split that a model is scored on too, by their content."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adamerge.data.base import Calibration
from adamerge.data.class_labels import LABEL
from adamerge.data.held_out import calibration_splits

if TYPE_CHECKING:
    import datasets


def overlap(data: Calibration, split: str, scored: Calibration | None = None) -> dict[str, int]:
    """Returns the number of samples in ``split`` that are calibration data too, of each task that has any.

    Splits that are drawn from one another share no row, yet two rows may hold the same, and splits that a data set brings
    may share rows. The columns that make a sample are compared as they are stored; class labels are not among them.

    Args:
        data: the tasks that are calibrated on.
        split: ``test`` or ``validation``.
        scored: whose split it is; that of ``data`` when None.
    """
    counts, scored = {}, data if scored is None else scored
    for task in data.fitted:
        if task not in scored.tasks or not data.splits(task).get("calibration") or not scored.splits(task).get(split):
            continue
        columns = data.columns(task)
        every = [data.rows(task, part) for part in calibration_splits(data)]
        calibrated = {content for rows in every for content in _contents(rows, columns)} - {None}
        shared = sum(content in calibrated for content in _contents(scored.rows(task, split), columns))
        if shared:
            counts[task] = shared
    return counts


def contents(data: Calibration) -> dict[str, str]:
    """Returns a hash of each task's calibration rows, in their order: other data are told by it, whatever their number."""
    return {
        task: _hash([data.rows(task, part) for part in calibration_splits(data)], data.columns(task))
        for task in data.fitted
    }


def labelled_contents(data: Calibration, split: str) -> dict[str, str]:
    """Returns a hash of each task's rows of a split with their labels, in their order."""
    found = {}
    for task in data.tasks:
        rows = data.rows(task, split)
        columns = dict.fromkeys([*data.columns(task), data.label_column(task), LABEL])
        found[task] = _hash([rows], [name for name in columns if name in rows.column_names])
    return found


def _hash(every: Sequence[datasets.Dataset], columns: Sequence[str]) -> str:
    from datasets.fingerprint import Hasher

    hashed: str = Hasher.hash([content for rows in every for content in _contents(rows, columns)])
    return hashed


def _contents(rows: datasets.Dataset, columns: Sequence[str]) -> Iterator[str | None]:
    """Yields a hash of each row's columns; None for a row that no sample can be made of."""
    from datasets import Image
    from datasets.fingerprint import Hasher

    rows = rows.select_columns(list(columns))
    for name, feature in list(rows.features.items()):
        if isinstance(feature, Image):
            rows = rows.cast_column(name, Image(decode=False))
    for row in rows:
        try:
            yield Hasher.hash([_stored(row[column]) for column in columns])
        except (OSError, TypeError):  # no such picture
            yield None


def _stored(value: Any) -> Any:
    """Returns what a file that a row names holds; other values as they are."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
    return value
