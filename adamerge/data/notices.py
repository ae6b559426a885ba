"""Notices: what a fit tells of its rows and labels before it begins, a line each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import datasets

from adamerge.data.class_labels import LABEL, LabelPlace, classes_of, unseen
from adamerge.data.samples import Samples
from adamerge.errors import DataError


def skipped_lines(read: Mapping[tuple[str, str], Samples]) -> list[str]:
    """Returns, of each split that was read and has some, how many rows are skipped, and the first of them with reasons.

    Args:
        read: samples by task and split.
    """
    return [
        f"task '{task}': {len(samples.skipped)} of {len(samples.rows)} rows of the {split} split cannot be used and are "
        f"skipped; {samples.examples()}"
        for (task, split), samples in read.items()
        if samples.skipped
    ]


def label_lines(labelled: Iterable[tuple[datasets.Dataset, LabelPlace]]) -> list[str]:
    """Returns what is odd about class labels that are scored by, and stops no fit: no classes, or classes without any row.

    Args:
        labelled: rows of splits with the place of their labels; those without class labels are passed by.
    """
    lines = []
    for rows, where in labelled:
        if LABEL not in rows.column_names:
            continue
        try:
            told = unseen(classes_of(rows, where), where)
        except DataError as error:
            told = f"{error.what}; it cannot be scored"
        lines += [told] if told is not None else []
    return lines
