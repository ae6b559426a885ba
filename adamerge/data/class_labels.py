"""Class labels: the column of a split that says each row's class, as numbers; what is none of the classes is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from adamerge.data.row_numbers import described
from adamerge.errors import DataError

if TYPE_CHECKING:
    import datasets

LABEL = "label"
"""Column of the classes, after a data module has arranged its columns."""
SHOWN = 8
"""Class names that an error lists."""
MANY_PER_CLASS = 20
"""Rows per class, on average, from which a class without any is told: of classes of one size, one in 500 million lacks."""


class LabelPlace(NamedTuple):
    """Whose labels they are, and what they may be.

    Attributes:
        task: whose.
        split: which of our splits.
        classnames: in label order; empty where they are not known.
        column: as the data set calls it.
    """

    task: str
    split: str
    classnames: Sequence[str] = ()
    column: str = LABEL

    def __str__(self) -> str:
        return f"task '{self.task}', {self.split} split"


def classes_of(rows: datasets.Dataset, where: LabelPlace) -> list[int]:
    """Returns the class of each row, a number from 0 on.

    A label is a whole number from 0 on below the number of classes, a truth value where there are two classes, or a class's
    name as it is spelled. The labels of a split are of one of these kinds.

    Raises:
        DataError: there are none, or one is none of the classes.
    """
    if LABEL not in rows.column_names:
        raise DataError(f"{where} has no labels", expected=f"column '{where.column}'", got=rows.column_names)
    try:
        labels = list(rows.select_columns([LABEL])[LABEL])
    except Exception as error:  # of whatever library decodes them
        raise DataError(f"{where}: column '{where.column}' cannot be read as labels: {error}") from error
    numbers: dict[Any, int] = {name: number for number, name in enumerate(where.classnames)}
    count = len(numbers) or None
    _refuse_two_readings(labels, numbers, rows, where)
    named = [isinstance(label, str) and label in numbers for label in labels]
    fits = named if any(named) else [_is_class(label, count) for label in labels]
    wrong = next((i for i, fitting in enumerate(fits) if not fitting), None)
    if wrong is not None:
        raise DataError(
            f"{where}: column '{where.column}' holds {labels[wrong]!r} in {described(rows, wrong)}, "
            "which is none of the classes",
            expected=_expected(where.classnames),
            got=f"{labels[wrong]!r} ({type(labels[wrong]).__name__})",
            todo=_advice(labels, where.classnames),
        )
    return [numbers[label] for label in labels] if any(named) else [int(label) for label in labels]


def _refuse_two_readings(
    labels: Sequence[Any], numbers: dict[Any, int], rows: datasets.Dataset, where: LabelPlace
) -> None:
    """Refuses a number or truth value that is one class by its place and, as it is spelled, the name of another."""
    for i, label in enumerate(labels):
        if isinstance(label, int) and numbers.get(str(label), int(label)) != int(label):
            raise DataError(
                f"{where}: column '{where.column}' holds {label!r} in {described(rows, i)}, which is the name of class "
                f"{numbers[str(label)]} and the number of another",
                expected=_expected(where.classnames),
                got=f"{label!r} ({type(label).__name__})",
                todo="write the labels as numbers from 0 on, or as texts in a format that keeps them, such as JSON lines",
            )


def begins_at_one(rows: datasets.Dataset, where: LabelPlace) -> bool:
    """Returns whether a split's labels are numbers of which none is 0 and one is the number of classes."""
    labels = rows.select_columns([LABEL])[LABEL] if LABEL in rows.column_names else []
    numbers = [label for label in labels if isinstance(label, int) and not isinstance(label, bool)]
    return bool(numbers) and len(numbers) == len(labels) and min(numbers) >= 1 and max(numbers) == len(where.classnames)


def oddity(rows: datasets.Dataset, where: LabelPlace) -> str | None:
    """Returns what is odd about labels that are scored by, and stops no fit; None where nothing is.

    That is a label that is no class, or a class without any row where there are so many rows that it should have some.
    """
    try:
        counts = Counter(classes_of(rows, where))
    except DataError as error:
        return f"{error.what}; it cannot be scored"
    names = where.classnames
    lacking = [name for number, name in enumerate(names) if not counts[number]]
    if not lacking or len(rows) < MANY_PER_CLASS * len(names):
        return None
    return (
        f"{where}: no label of {len(rows)} is {_listed(lacking)}: {len(lacking)} of {len(names)} classes. If that is not "
        "so, the labels mean other classes"
    )


def _is_class(label: Any, count: int | None) -> bool:
    if isinstance(label, bool):
        return count is None or count == 2
    return isinstance(label, int) and label >= 0 and (count is None or label < count)


def _expected(names: Sequence[str]) -> str:
    if not names:
        return "whole numbers from 0 on"
    return f"0 to {len(names) - 1}, or a class's name: {_listed(names)}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:SHOWN]) + more


def _advice(labels: Sequence[Any], names: Sequence[str]) -> str:
    """Returns what to do about such labels, by what they most likely are."""
    numbers = [label for label in labels if isinstance(label, int) and not isinstance(label, bool)]
    words = [label for label in labels if isinstance(label, str)]
    if len(numbers) == len(labels) and names and min(numbers) >= 1 and max(numbers) == len(names):
        return f"labels begin at 1 and go to {len(names)}: subtract 1 from each"
    if any(label is None or (isinstance(label, int) and label < 0) for label in labels):
        return "name a split whose labels are published, such as test: validation, or remove the rows"
    if words:
        spelled = {name.strip().lower(): name for name in names}
        near = next((word for word in words if word not in names and word.strip().lower() in spelled), None)
        if near is not None:
            return f"spell labels as the classes are: '{near}' is not '{spelled[near.strip().lower()]}'"
        if all(word.strip().lstrip("+-").isdigit() for word in words):
            return "write the labels as numbers, not as text"
        return "list classnames in the configuration as the labels are spelled, in the order of the experts' rows"
    if any(isinstance(label, float) for label in labels):
        return "write the labels as whole numbers; a column with gaps, or of scores, is read as one of fractions"
    if any(isinstance(label, list | dict) for label in labels):
        return "give each row one label, a number or a class's name; name another label_column"
    return "repair the labels, or list all classnames in the configuration"
