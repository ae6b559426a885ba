"""Tables: data sets on disk, in files or on the Hub, as they are, with the columns that a task needs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from adamerge.data.data_files import SYNONYMS, find_files, read_files, read_pictures, refuse_irregular
from adamerge.data.dataset import Dataset
from adamerge.data.file_faults import cause
from adamerge.data.row_numbers import is_number
from adamerge.data.saved_sets import read_saved, tells_itself
from adamerge.errors import DataError
from adamerge.io.hub_ids import is_hub_id, missing


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

    def read(self, task: str) -> dict[str, Dataset]:
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
        """Returns the path of the data set, where it is on this machine."""
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

    def _from_path(self, where: str) -> dict[str, Dataset]:
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

    def _from_hub(self, where: str) -> dict[str, Dataset]:
        import datasets

        name, _, revision = self.dataset.partition("@")
        try:
            return dict(datasets.load_dataset(name, self.config, revision=revision or None))
        except (Exception, StopIteration) as error:
            raise DataError(
                f"{where}: the data set {self.dataset} cannot be read: {missing(self.dataset)}, and {cause(error)}",
                todo="give a folder or file that exists, or a Hub id while online (HF_HUB_OFFLINE unset)",
            ) from error

    def need(self, task: str, split: str, rows: Dataset, columns: list[str]) -> None:
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
