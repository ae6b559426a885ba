"""Classification tasks in tables: labels, and the words for zero-shot heads."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from adamerge.backbones import Task
from adamerge.backbones.zero_shot_head import check_words
from adamerge.data.class_labels import LABEL
from adamerge.data.dataset import Dataset
from adamerge.data.table_calibration import TableCalibration
from adamerge.data.tables import Table
from adamerge.data.vocabulary import Vocabulary, load_vocabulary
from adamerge.errors import DataError


@dataclass
class ClassTable(Table, ABC):
    """One classification task, whose rows are in a table.

    Args:
        dataset: a folder written by ``save_to_disk``, a folder of images or of data files, one data file, or a Hub id.
        templates: prompts with ``{}`` where the class name goes; the vocabulary's when empty.
        classnames: in label order; the vocabulary's when empty, and without one the data set's own.
        label_column: holds the label, an integer from 0 on or a class's name.
        vocabulary: of a public task, such as ``sun397``: its class names and templates.
        as_trained: ``classnames`` are the rows of the head that the expert was tuned with, in its order, though the data set
            has its classes in another: that is then not refused, and the base's accuracy on classes whose rows moved
            means nothing.
    """

    templates: list[str] = field(default_factory=list)
    classnames: list[str] = field(default_factory=list)
    label_column: str = field(default="label", kw_only=True)
    vocabulary: str | None = field(default=None, kw_only=True)
    as_trained: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.vocabulary is not None:
            load_vocabulary(self.vocabulary)  # refused before any data set is opened
        check_words(f"the task of {self.dataset}", self.classnames, self.templates)

    @property
    @abstractmethod
    def inputs(self) -> dict[str, str]:
        """Returns the data set's columns that make a sample, by the names that they have here."""

    @property
    def words(self) -> Vocabulary:
        """Returns the configured class names and templates; empty where they are left to the data set."""
        known = load_vocabulary(self.vocabulary) if self.vocabulary is not None else Vocabulary((), ())
        return Vocabulary(
            tuple(self.classnames) or known.classnames,
            tuple(self.templates) or known.templates,
            self.as_trained if self.classnames else known.as_trained,
        )


ClassSource = TypeVar("ClassSource", bound=ClassTable)
"""Where the rows of each classification task of a kind of data are."""


class ClassCalibration(TableCalibration[ClassSource]):
    """Classification tasks by name, whose rows are in tables."""

    def words(self, task: str) -> Task:
        """Returns the class names of the configuration, or else of the data set, and the templates of the configuration."""
        return Vocabulary(self._classnames(task), self.sources[task].words.templates)

    def columns(self, task: str) -> tuple[str, ...]:
        """Returns the names of the columns that make a sample of a task."""
        return tuple(self.sources[task].inputs.values())

    def label_column(self, task: str) -> str:
        """Returns the name of the column of a task's labels, as its data set calls it."""
        return self.sources[task].label_column

    def read(self, task: str, split: str, value: Any) -> Any:
        """Returns the value of the one column, or a mapping of both texts.

        Raises:
            DataError: it is null.
        """
        for name, part in value.items() if isinstance(value, Mapping) else [(self.columns(task)[0], value)]:
            if part is None:
                raise DataError(f"there is no {name} in it")
        return value

    def arrange(self, task: str, split: str, rows: Dataset) -> Dataset:
        """Renames the sample's columns and the label's; labels may lack where they are never read."""
        source = self.sources[task]
        names = {**source.inputs, source.label_column: LABEL}
        source.need(task, split, rows, list(names if split == source.test else source.inputs))
        rows = rows.rename_columns({old: new for old, new in names.items() if old != new and old in rows.column_names})
        self._check_classes(task, rows)
        return rows

    def _check_classes(self, task: str, rows: Dataset) -> None:
        """Refuses class names that cannot belong to the labels, as far as the data set names its classes."""
        from datasets import ClassLabel

        words = self.sources[task].words
        feature, given = rows.features.get(LABEL), words.classnames
        if not given or not isinstance(feature, ClassLabel):
            return
        if len(given) != len(feature.names):
            what = f"task '{task}': {len(given)} class names for the classes of {self.sources[task].dataset}"
            raise DataError(what, expected=f"{len(feature.names)} class names", got=len(given))
        ours, theirs = (
            [re.sub(r"[\W_]+", " ", name).strip().lower() for name in names] for names in (given, feature.names)
        )
        if ours != theirs and sorted(ours) == sorted(theirs) and not words.as_trained:
            label = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
            raise DataError(
                f"task '{task}': {self.sources[task].dataset} has these classes in another order",
                expected=f"label {label}: '{feature.names[label]}'",
                got=f"'{given[label]}'",
                todo="list classnames in the data set's order, or say as_trained: true if the expert has these rows",
            )

    def _classnames(self, task: str) -> tuple[str, ...]:
        from datasets import ClassLabel

        given = self.sources[task].words.classnames
        if given:
            return given
        feature = self.rows(task, "test").features[LABEL]
        if not isinstance(feature, ClassLabel):
            raise DataError(
                f"task '{task}': the data set names no classes", todo="list classnames in the configuration"
            )
        return tuple(feature.names)
