"""Calibration data in tables: the splits that a data set has are taken as they are, and those that it lacks are drawn."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from adamerge.backbones import Task
from adamerge.data.base import Calibration
from adamerge.data.batch_order import seed_of
from adamerge.data.data_files import SYNONYMS
from adamerge.data.dataset import Dataset
from adamerge.data.drawn_splits import draw
from adamerge.data.row_numbers import numbered
from adamerge.data.tables import Table
from adamerge.errors import ConfigError, DataError
from adamerge.io.hub_ids import is_hub_id

Source = TypeVar("Source", bound=Table)
"""Where the rows of each task of a kind of data are."""


@dataclass(eq=False, kw_only=True)
class TableCalibration(Calibration, Generic[Source]):
    """Calibration tasks by name, whose rows are in tables.

    The splits ``calibration``, ``validation`` and ``test`` that a data set has are taken as they are. Those that it lacks
    are drawn from ``train`` by a seeded permutation, and the rest stays ``train``: the four splits are disjoint by
    construction.

    Args:
        calibration_fraction: share of ``train`` that is drawn, where the data set has no split of that name.
        validation_fraction: likewise.
        test_fraction: likewise, and at most what the others leave; labelled as far as ``train`` is.

    Attributes:
        sources: task to where its rows are, as ``tasks`` was given.

    Raises:
        ConfigError: no tasks, an unknown vocabulary, or fractions out of range.
        DataError: a data set cannot be read, lacks a column, or orders the same classes differently.
    """

    calibration_fraction: float = 0.1
    validation_fraction: float = 0.1
    test_fraction: float = 0.2

    def __post_init__(self) -> None:
        """Refuses fractions out of range and data without tasks, before any data set is opened."""
        super().__post_init__()
        if not self.sources:
            raise ConfigError("data: tasks is empty", expected="a mapping {task: {dataset, ...}}", got="{}")
        fractions = self.calibration_fraction, self.validation_fraction
        if min(fractions) <= 0 or sum(fractions) >= 1:
            raise ConfigError(
                "data: calibration_fraction and validation_fraction must be positive and sum to less than 1",
                got=f"{self.calibration_fraction} and {self.validation_fraction}",
            )
        if not 0 < self.test_fraction < 1:
            raise ConfigError(f"data: test_fraction must be between 0 and 1, got {self.test_fraction}")
        self._drawn: dict[str, dict[str, int]] = {}

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Class names and templates of every task; what is given for it says where their rows are."""
        return {task: self.words(task) for task in self.sources}

    @tasks.setter
    def tasks(self, sources: dict[str, Source]) -> None:
        self.sources = dict(sources)

    @abstractmethod
    def words(self, task: str) -> Task:
        """Returns class names and templates of a task."""

    @abstractmethod
    def arrange(self, task: str, split: str, rows: Dataset) -> Dataset:
        """Returns the rows of one split with columns of our names.

        Raises:
            DataError: a column lacks, or does not hold what it should.
        """

    def load(self, task: str) -> Mapping[str, Dataset]:
        """Reads the data set, arranges its columns, and draws what splits it lacks."""
        source = self.sources[task]
        splits: dict[str, Any] = {
            split: self.arrange(task, split, numbered(rows, split)) for split, rows in source.read(task).items()
        }
        for ours, theirs in (("test", source.test), ("train", source.train)):
            name = theirs if theirs in splits else SYNONYMS.get(theirs, theirs)
            if name in splits:
                splits[ours] = splits.pop(name)
            elif theirs != ours:
                raise DataError(
                    f"task '{task}': {source.dataset} has no split '{theirs}', which {ours} names",
                    expected=f"of {list(splits)}",
                    got=theirs,
                    todo=f"name one of them, or leave {ours} out",
                )
        shares = {
            "calibration": self.calibration_fraction,
            "validation": self.validation_fraction,
            "test": self.test_fraction,
        }
        lacking = {split: share for split, share in shares.items() if split not in splits}
        if lacking and "train" in splits:
            rows = splits["train"]
            drawn = draw(rows, lacking, seed_of(self._splits_seed, task, "splits"))
            self._drawn[task] = {split: len(drawn[split]) for split in lacking} | {"of": len(rows)}
            splits |= drawn
        return splits

    @property
    def _splits_seed(self) -> int:
        return self.seed if self.splits_seed is None else self.splits_seed

    def drawn(self, task: str) -> dict[str, int]:
        """Returns the number of rows that were drawn for each split, and as ``of`` of how many; empty where none were."""
        self.splits(task)
        return self._drawn.get(task, {})

    @property
    def protocol(self) -> dict[str, Any]:
        """Returns which data a run used, and how many rows of which splits were drawn from ``train``, by ``seed``."""
        drawn = {task: counts for task in self.fitted if (counts := self.drawn(task))}
        seeded = {"drawn_from_train": drawn} | ({} if self.splits_seed is None else {"splits_seed": self.splits_seed})
        return super().protocol | (seeded if drawn else {})

    def notices(self, experts: Collection[str] = ()) -> list[str]:
        """Returns what a fit tells of its data before it begins, a line each, and which files of folders were not read."""
        lines = super().notices(experts)
        for task in self.fitted:
            unread = self.sources[task].unread(task)
            if unread:
                lines.append(f"{task}: not read, since no name says of which split: {', '.join(unread[:6])}")
        return lines

    def at_hand(self, task: str) -> bool:
        """Returns whether a task's data set is a file or folder that is there."""
        source = self.sources[task]
        return not is_hub_id(source.dataset) and source.path.exists()

    def origin(self, task: str, split: str) -> str:
        """Returns whether a split was drawn or given, for people."""
        drawn = self.drawn(task)
        if split not in drawn:
            return "given"
        if split != next(iter(drawn)):
            return "drawn"
        return f"drawn from {drawn['of']:,} rows of train, seed {self._splits_seed}"
