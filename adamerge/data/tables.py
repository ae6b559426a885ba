"""Tables: data sets on disk, in files or on the Hub, with the columns that a task needs; splits that lack are drawn."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch

from adamerge.data.base import Calibration
from adamerge.data.row_numbers import numbered
from adamerge.data.samples import UNUSABLE_SHARE
from adamerge.data.steps import seed_of
from adamerge.errors import CheckpointError, ConfigError, DataError
from adamerge.files import read_json

_FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


@dataclass
class Table:
    """Where the rows of a task are.

    Args:
        dataset: a folder written by ``save_to_disk``, a folder of images or of data files, one data file, or a Hub id.
        config: of a Hub data set that has several.
        test: name of the split for reporting.
        train: name of the split from which calibration and validation are drawn, where the data set lacks them.
    """

    dataset: str
    config: str | None = field(default=None, kw_only=True)
    test: str = field(default="test", kw_only=True)
    train: str = field(default="train", kw_only=True)

    def read(self, task: str) -> dict[str, datasets.Dataset]:
        """The splits as they are.

        Raises:
            DataError: the data set cannot be read.
        """
        place = Path(self.dataset).expanduser()
        try:
            if (place / "dataset_dict.json").is_file():
                return dict(datasets.load_from_disk(str(place)))
            if place.is_dir():
                return dict(datasets.load_dataset(str(place)))
            if place.suffix in _FILES:
                return dict(datasets.load_dataset(_FILES[place.suffix], data_files=str(place)))
            return dict(datasets.load_dataset(self.dataset, self.config))
        except (Exception, StopIteration) as error:
            empty = _empty_splits(place)
            reason = f"its split '{empty[0]}' is empty" if empty else error or type(error).__name__
            raise DataError(
                f"task '{task}': the data set {self.dataset} cannot be read: {reason}",
                todo="give a folder or file that exists, or a Hub id while online (HF_HUB_OFFLINE unset)",
            ) from error

    def need(self, task: str, split: str, rows: datasets.Dataset, columns: list[str]) -> None:
        """See whether a split has these columns.

        Raises:
            DataError: it lacks one.
        """
        for column in columns:
            if column not in rows.column_names:
                raise DataError(
                    f"task '{task}': split '{split}' of {self.dataset} has no column '{column}'",
                    expected=f"columns {columns}",
                    got=rows.column_names,
                )


def _empty_splits(folder: Path) -> list[str]:
    """Splits of a saved data set that have no rows; the library that wrote them cannot read them."""
    found = []
    for state in sorted(folder.glob("*/state.json")):
        try:
            if not read_json(state).get("_data_files"):
                found.append(state.parent.name)
        except CheckpointError:  # damaged: that is another reason
            continue
    return found


class TableCalibration(Calibration):
    """Tasks whose rows are in tables.

    A data set with splits ``calibration`` and ``validation`` gives them as they are; otherwise both are drawn from
    ``train`` by a seeded permutation, and the rest stays ``train``: the four splits are disjoint by construction.
    """

    def __init__(
        self,
        sources: Mapping[str, Table],
        batch_size: int = 16,
        seed: int = 0,
        transductive: bool = False,
        labelled: bool = False,
        calibration_samples: int | None = None,
        eval_batch_size: int = 256,
        workers: int = 0,
        calibration_fraction: float = 0.1,
        validation_fraction: float = 0.1,
        shots: int | None = None,
        only: Sequence[str] | None = None,
        unusable_share: float = UNUSABLE_SHARE,
    ) -> None:
        super().__init__(
            batch_size,
            seed,
            transductive,
            labelled,
            calibration_samples,
            eval_batch_size,
            workers,
            shots,
            only,
            unusable_share,
        )
        if not sources:
            raise ConfigError("data: tasks is empty", expected="a mapping {task: {dataset, ...}}", got="{}")
        if min(calibration_fraction, validation_fraction) <= 0 or calibration_fraction + validation_fraction >= 1:
            raise ConfigError(
                "data: calibration_fraction and validation_fraction must be positive and sum to less than 1",
                got=f"{calibration_fraction} and {validation_fraction}",
            )
        self.sources = dict(sources)
        self.calibration_fraction, self.validation_fraction = calibration_fraction, validation_fraction

    @abstractmethod
    def arrange(self, task: str, split: str, rows: datasets.Dataset) -> datasets.Dataset:
        """The rows of one split with columns of our names.

        Raises:
            DataError: a column lacks, or does not hold what it should.
        """

    def load(self, task: str) -> Mapping[str, datasets.Dataset]:
        """Read the data set, arrange its columns, and draw what splits it lacks."""
        source = self.sources[task]
        splits: dict[str, Any] = {
            split: self.arrange(task, split, numbered(rows, split)) for split, rows in source.read(task).items()
        }
        if source.test in splits:
            splits["test"] = splits.pop(source.test)
        if not {"calibration", "validation"} <= splits.keys() and source.train in splits:
            splits |= self._draw(task, splits.pop(source.train))
        return splits

    def _draw(self, task: str, rows: datasets.Dataset) -> dict[str, datasets.Dataset]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, task, "splits"))
        order = torch.randperm(len(rows), generator=generator).tolist()
        first = round(len(rows) * self.calibration_fraction)
        second = first + round(len(rows) * self.validation_fraction)
        return {
            "calibration": rows.select(order[:first]),
            "validation": rows.select(order[first:second]),
            "train": rows.select(order[second:]),
        }
