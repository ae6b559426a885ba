"""Image tasks from Hugging Face data sets: on disk, in folders of images, or on the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch

from adamerge.backbones import Task
from adamerge.data.base import Calibration
from adamerge.data.steps import seed_of
from adamerge.data.vocabulary import Vocabulary, load_vocabulary
from adamerge.errors import ConfigError, DataError


@dataclass
class ImageTask:
    """One task's images and the words for its zero-shot head.

    Args:
        dataset: a folder written by ``save_to_disk``, a folder of images, or a Hub id.
        templates: prompts with ``{}`` where the class name goes; the vocabulary's when empty.
        classnames: in label order; the vocabulary's when empty, and without one the data set's own.
        config: of a Hub data set that has several.
        test: name of the split for reporting.
        train: name of the split from which calibration and validation are drawn, where the data set lacks them.
        image_column: holds the image.
        label_column: holds the label, an integer.
        vocabulary: of a public task, such as ``sun397``: its class names and templates.
    """

    dataset: str
    templates: list[str] = field(default_factory=list)
    classnames: list[str] = field(default_factory=list)
    config: str | None = None
    test: str = "test"
    train: str = "train"
    image_column: str = "image"
    label_column: str = "label"
    vocabulary: str | None = None

    @property
    def words(self) -> Vocabulary:
        """What the configuration says of class names and templates; empty where it leaves them to the data set."""
        known = load_vocabulary(self.vocabulary) if self.vocabulary is not None else Vocabulary((), ())
        return Vocabulary(
            tuple(self.classnames) or known.classnames,
            tuple(self.templates) or known.templates,
        )


class ImageCalibration(Calibration):
    """Image tasks by name.

    A data set with splits ``calibration`` and ``validation`` gives them as they are; otherwise both are drawn from
    ``train`` by a seeded permutation, and the rest stays ``train``: the four splits are disjoint by construction.

    Args:
        tasks: task name to its data.
        batch_size: samples per task and step, over all processes.
        seed: of the order of batches and of splits that are drawn.
        transductive: calibrate on the inputs of the test split, as the papers do; written into the summary and the card.
        labelled: hand the labels to the objective.
        calibration_samples: use so many of each task's calibration samples; all when None.
        eval_batch_size: samples per batch in validation and test.
        workers: processes that decode; 0 decodes in the main process.
        calibration_fraction: of ``train``, where the data set has no split of that name.
        validation_fraction: likewise.
        shots: calibrate on so many samples of each class; needs ``labelled``.
        only: calibrate and validate on these tasks alone; all when None.

    Raises:
        ConfigError: no tasks, an unknown vocabulary, or fractions out of range.
        DataError: a data set cannot be read, lacks a column, or orders the same classes differently.
    """

    def __init__(
        self,
        tasks: dict[str, ImageTask],
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
    ) -> None:
        super().__init__(
            batch_size, seed, transductive, labelled, calibration_samples, eval_batch_size, workers, shots, only
        )
        if not tasks:
            raise ConfigError("data: tasks is empty", expected="a mapping {task: {dataset, templates}}", got="{}")
        if min(calibration_fraction, validation_fraction) <= 0 or calibration_fraction + validation_fraction >= 1:
            raise ConfigError(
                "data: calibration_fraction and validation_fraction must be positive and sum to less than 1",
                got=f"{calibration_fraction} and {validation_fraction}",
            )
        self.sources = tasks
        self._words = {task: source.words for task, source in tasks.items()}
        self.calibration_fraction, self.validation_fraction = calibration_fraction, validation_fraction

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Class names of the configuration, or else of the data sets."""
        return {task: Vocabulary(self._classnames(task), words.templates) for task, words in self._words.items()}

    def load(self, task: str) -> Mapping[str, datasets.Dataset]:
        """Read the data set, check its columns, and draw what splits it lacks."""
        source = self.sources[task]
        found = self._read(task)
        columns = {source.image_column: self.columns[0], source.label_column: self.label_column}
        for split, rows in found.items():
            # labels may lack where they are never read
            needed = columns if split == source.test else [source.image_column]
            for column in needed:
                if column not in rows.column_names:
                    raise DataError(
                        f"task '{task}': split '{split}' of {source.dataset} has no column '{column}'",
                        expected=f"columns {list(needed)}",
                        got=rows.column_names,
                    )
        splits = {
            split: rows.rename_columns(
                {old: new for old, new in columns.items() if old != new and old in rows.column_names}
            )
            for split, rows in found.items()
        }
        for rows in splits.values():
            self._check_classes(task, rows)
        if source.test in splits:
            splits["test"] = splits.pop(source.test)
        if not {"calibration", "validation"} <= splits.keys() and source.train in splits:
            splits |= self._draw(task, splits.pop(source.train))
        return splits

    def _check_classes(self, task: str, rows: datasets.Dataset) -> None:
        """Refuse class names that cannot belong to the labels, as far as the data set names its classes."""
        feature, given = rows.features.get(self.label_column), self._words[task].classnames
        if not given or not isinstance(feature, datasets.ClassLabel):
            return
        if len(given) != len(feature.names):
            what = f"task '{task}': {len(given)} class names for the classes of {self.sources[task].dataset}"
            raise DataError(what, expected=f"{len(feature.names)} class names", got=len(given))
        ours, theirs = (
            [re.sub(r"[\W_]+", " ", name).strip().lower() for name in names] for names in (given, feature.names)
        )
        if ours != theirs and sorted(ours) == sorted(theirs):
            place = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
            raise DataError(
                f"task '{task}': {self.sources[task].dataset} has these classes in another order",
                expected=f"label {place}: '{feature.names[place]}'",
                got=f"'{given[place]}'",
                todo="list classnames in the data set's order",
            )

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

    def _classnames(self, task: str) -> tuple[str, ...]:
        if self._words[task].classnames:
            return self._words[task].classnames
        feature = self.rows(task, "test").features[self.label_column]
        if not isinstance(feature, datasets.ClassLabel):
            raise DataError(
                f"task '{task}': the data set names no classes", todo="list classnames in the configuration"
            )
        return tuple(feature.names)

    def _read(self, task: str) -> dict[str, Any]:
        source = self.sources[task]
        folder = Path(source.dataset).expanduser()
        try:
            if (folder / "dataset_dict.json").is_file():
                return dict(datasets.load_from_disk(str(folder)))
            if folder.is_dir():
                return dict(datasets.load_dataset("imagefolder", data_dir=str(folder)))
            return dict(datasets.load_dataset(source.dataset, source.config))
        except Exception as error:
            raise DataError(
                f"task '{task}': the data set {source.dataset} cannot be read: {error}",
                todo="give a folder that exists, or a Hub id while online (HF_HUB_OFFLINE unset)",
            ) from error
