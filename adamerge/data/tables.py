"""Tables: data sets on disk, in files or on the Hub, with the columns that a task needs; splits that lack are drawn."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from adamerge.backbones import Task
from adamerge.data.base import Calibration
from adamerge.data.batch_order import seed_of
from adamerge.data.data_files import SYNONYMS, find_files, read_files, read_pictures, refuse_irregular
from adamerge.data.drawn_splits import draw
from adamerge.data.file_faults import cause
from adamerge.data.row_numbers import is_number, numbered
from adamerge.data.saved_sets import read_saved, tells_itself
from adamerge.errors import ConfigError, DataError
from adamerge.io.hub_ids import is_hub_id, missing

if TYPE_CHECKING:
    import datasets


@dataclass
class Table:
    """Where the rows of a task are.

    Args:
        dataset: a folder written by ``save_to_disk``, a folder of images or of data files, one data file, or a Hub id
            ``org/name[@revision]``. What looks like a path is one, and is never looked for on the Hub.
        config: of a Hub data set that has several.
        test: name of the split for reporting.
        train: name of the split from which the others are drawn, where the data set lacks them.
    """

    dataset: str
    config: str | None = field(default=None, kw_only=True)
    test: str = field(default="test", kw_only=True)
    train: str = field(default="train", kw_only=True)

    def read(self, task: str) -> dict[str, datasets.Dataset]:
        """Returns the splits as they are, by their own names; ``valid``, ``dev`` and the like are ``validation``.

        Raises:
            DataError: the data set cannot be read.
        """
        where = f"task '{task}'"
        splits = self._from_hub(where) if is_hub_id(self.dataset) else self._from_path(where)
        for name in [name for name in splits if name not in self._own]:
            ours = SYNONYMS.get(name.lower(), name)
            if ours not in splits:
                splits[ours] = splits.pop(name)
        return splits

    def unread(self, task: str) -> list[str]:
        """Returns the data files of the folder that belong to no split, while others do."""
        if is_hub_id(self.dataset) or not self.path.is_dir() or tells_itself(self.path, self.config):
            return []
        unread = find_files(self.path, self._own, f"task '{task}'").unread
        return [str(path.relative_to(self.path)) for path in unread]

    @property
    def path(self) -> Path:
        """Path of the data set, where it is on this machine."""
        return Path(os.path.expanduser(self.dataset))

    def roots(self, task: str, split: str) -> list[Path]:
        """Returns the folders that relative paths in the rows may start from; none for a data set of the Hub."""
        if is_hub_id(self.dataset):
            return []
        if not self.path.is_dir():
            return [self.path.parent]
        if tells_itself(self.path, self.config):
            return [self.path]
        files = find_files(self.path, self._own, f"task '{task}'").splits.get(split, ())
        return list(dict.fromkeys([*(path.parent for path in files), self.path]))

    @property
    def _own(self) -> set[str]:
        return {self.test, self.train}

    def _from_path(self, where: str) -> dict[str, datasets.Dataset]:
        path = self.path
        try:
            os.stat(path)
        except (OSError, ValueError) as error:
            gone = isinstance(error, FileNotFoundError | NotADirectoryError)
            raise DataError(
                f"{where}: the data set {self.dataset} cannot be read: {missing(self.dataset) if gone else error}",
                todo="give a folder or file that exists, or a Hub id, which is org/name",
            ) from error
        if not path.is_dir():
            refuse_irregular(path, where)
            return {"train": read_files([path], where)}
        if tells_itself(path, self.config):
            return read_saved(path, self.config, where)
        files = find_files(path, self._own, where).splits
        if not files:
            return read_pictures(path, where)
        return {split: read_files(paths, f"{where}, {split} split") for split, paths in files.items()}

    def _from_hub(self, where: str) -> dict[str, datasets.Dataset]:
        import datasets

        name, _, revision = self.dataset.partition("@")
        try:
            return dict(datasets.load_dataset(name, self.config, revision=revision or None))
        except (Exception, StopIteration) as error:
            raise DataError(
                f"{where}: the data set {self.dataset} cannot be read: {missing(self.dataset)}, and {cause(error)}",
                todo="give a folder or file that exists, or a Hub id while online (HF_HUB_OFFLINE unset)",
            ) from error

    def need(self, task: str, split: str, rows: datasets.Dataset, columns: list[str]) -> None:
        """Checks that a split has these columns.

        Raises:
            DataError: it lacks one.
        """
        for column in columns:
            if column not in rows.column_names:
                raise DataError(
                    f"task '{task}': split '{split}' of {self.dataset} has no column '{column}'",
                    expected=f"columns {columns}",
                    got=[name for name in rows.column_names if not is_number(name)],
                )


Source = TypeVar("Source", bound=Table)
"""Where the rows of each task of a kind of data are."""


@dataclass(eq=False, kw_only=True)
class TableCalibration(Calibration, Generic[Source]):
    """Tasks whose rows are in tables.

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
    def arrange(self, task: str, split: str, rows: datasets.Dataset) -> datasets.Dataset:
        """Returns the rows of one split with columns of our names.

        Raises:
            DataError: a column lacks, or does not hold what it should.
        """

    def load(self, task: str) -> Mapping[str, datasets.Dataset]:
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
            drawn = draw(rows, lacking, seed_of(self.seed, task, "splits"))
            self._drawn[task] = {split: len(drawn[split]) for split in lacking} | {"of": len(rows)}
            splits |= drawn
        return splits

    def drawn(self, task: str) -> dict[str, int]:
        """Returns the number of rows that were drawn for each split, and as ``of`` of how many; empty where none were."""
        self.splits(task)
        return self._drawn.get(task, {})

    @property
    def protocol(self) -> dict[str, Any]:
        """Which data a run used, and how many rows of which splits were drawn from ``train``, by ``seed``."""
        drawn = {task: counts for task in self.fitted if (counts := self.drawn(task))}
        return super().protocol | ({"drawn_from_train": drawn} if drawn else {})

    def notices(self, experts: Collection[str] = ()) -> list[str]:
        """Returns what a fit tells of its data before it begins, a line each, and which files of folders were not read."""
        lines = super().notices(experts)
        for task in self.fitted:
            unread = self.sources[task].unread(task)
            if unread:
                lines.append(f"{task}: not read, since no name says of which split: {', '.join(unread[:6])}")
        return lines

    def origin(self, task: str, split: str) -> str:
        """Returns whether a split was drawn or given, for people."""
        drawn = self.drawn(task)
        if split not in drawn:
            return "given"
        return "drawn" if split != next(iter(drawn)) else f"drawn from {drawn['of']:,} rows of train, seed {self.seed}"
