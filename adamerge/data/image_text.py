"""Tasks of vision-language models: an image, a question, and a response; also from Expert Merging's calibration JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from adamerge.data.language import LanguageCalibration, LanguageTask
from adamerge.data.picture_paths import as_pictures


@dataclass
class ImageTextTask(LanguageTask):
    """Questions about images.

    A ``.json`` file is read as Expert Merging's calibration data: a list of objects with ``image_path``, ``question``,
    and, where there is one, ``response``. Its rows are calibration samples, all of them; it has no other split.

    Args:
        dataset: a folder written by ``save_to_disk``, a calibration ``.json``, another data file or a folder of them, or a
            Hub id.
        text: the question, a template over the row's columns.
        response: what the model should say, likewise; without one, the positions of the question count. It is a label:
            calibration without labels reads the question alone, unless ``response_is_input``.
        words: for columns of numbers, the word of each number.
        image_column: holds the image, or its path.
        images: folder that relative paths start from; that of the data file by default.
        config: of a Hub data set that has several.
        test: name of the split for reporting.
        train: name of the split from which the others are drawn, where the data set lacks them.
        response_is_input: read the response as text that follows the question, also without labels, as Expert Merging does;
            the summary and the card then say so.

    Reference: Expert Merging (2025), https://arxiv.org/abs/2509.25712.
    """

    text: str = "{question}"
    image_column: str = field(default="image", kw_only=True)
    images: str | None = field(default=None, kw_only=True)

    def sample(self, row: Mapping[str, Any], responds: bool = True) -> Any:
        """``{"image", "question", "response"}``, the response None where there is none or it is not wanted."""
        words = super().sample({name: value for name, value in row.items() if name != self.image_column}, responds)
        image = row[self.image_column]
        if isinstance(words, str):
            return {"image": image, "question": words, "response": None}
        return {"image": image, "question": words["prompt"], "response": words["response"] or None}

    def fields(self) -> list[str]:
        """The columns of question and response, and the image."""
        return [*super().fields(), self.image_column]

    def read(self, task: str) -> dict[str, datasets.Dataset]:
        """The splits, images by path opened when they are needed.

        Raises:
            DataError: the file or data set cannot be read, or an image is not there.
        """
        splits = super().read(task)
        if self.place.suffix.lower() == ".json" and not self.place.is_dir():
            splits = {"calibration": next(iter(splits.values()))}
            if self.image_column == "image":
                splits = {split: self._renamed(rows) for split, rows in splits.items()}
        todo = "set images to the folder that the paths start from"
        return {
            split: as_pictures(rows, self.image_column, partial(self.roots, task, split), task, self.dataset, todo)
            for split, rows in splits.items()
        }

    def roots(self, task: str, split: str) -> list[Path]:
        """``images``, where it is given."""
        return super().roots(task, split) if self.images is None else [Path(self.images).expanduser()]

    def _renamed(self, rows: datasets.Dataset) -> datasets.Dataset:
        known = "image_path" in rows.column_names and "image" not in rows.column_names
        return rows.rename_column("image_path", "image") if known else rows


class ImageTextCalibration(LanguageCalibration):
    """Questions about images, by task.

    Args:
        tasks: task name to its data.
        batch_size: samples per task and step, over all processes.
        seed: of the order of batches and of splits that are drawn.
        transductive: calibrate on the inputs of the test split, as the papers do; written into the summary and the card.
        labelled: hand the labels to the objective.
        calibration_samples: use so many of each task's calibration samples; all when None.
        eval_batch_size: samples per batch in validation and test.
        workers: processes that decode; 0 decodes in the main process.
        calibration_fraction: share of ``train`` that is drawn, where the data set has no split of that name.
        validation_fraction: likewise.
        test_fraction: likewise, and at most what the others leave; labelled as far as ``train`` is.
        shots: calibrate on so many samples of each class, drawn by ``seed``; needs ``labelled``.
        only: calibrate and validate on these tasks alone, though the pool has experts of others; all when None.
        unusable_share: of a split's rows that may be skipped because nothing can be made of them.

    Raises:
        ConfigError: no tasks, or fractions out of range.
        DataError: a data set or an image cannot be read, or a column lacks.
    """

    def __init__(
        self,
        tasks: dict[str, ImageTextTask],
        batch_size: int = 1,
        seed: int = 0,
        transductive: bool = False,
        labelled: bool = False,
        calibration_samples: int | None = None,
        eval_batch_size: int = 8,
        workers: int = 0,
        calibration_fraction: float = 0.1,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        shots: int | None = None,
        only: Sequence[str] | None = None,
        unusable_share: float = 0.05,
    ) -> None:
        super().__init__(
            dict(tasks),
            batch_size,
            seed,
            transductive,
            labelled,
            calibration_samples,
            eval_batch_size,
            workers,
            calibration_fraction,
            validation_fraction,
            test_fraction,
            shots,
            only,
            unusable_share,
        )
