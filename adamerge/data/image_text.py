"""Tasks of vision-language models: an image, a question, and a response; also from Expert Merging's calibration JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from adamerge.data.dataset import Dataset
from adamerge.data.language import LanguageCalibration, LanguageTask
from adamerge.data.picture_paths import as_pictures


@dataclass
class ImageTextTask(LanguageTask):
    """One task of questions about images, and their answers.

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

    Reference: Expert Merging (Zhang et al., 2025), https://arxiv.org/abs/2509.25712.
    """

    text: str = "{question}"
    image_column: str = field(default="image", kw_only=True)
    images: str | None = field(default=None, kw_only=True)

    def sample(self, row: Mapping[str, Any], responds: bool = True) -> Any:
        """Returns ``{"image", "question", "response"}``, the response None where there is none or it is not wanted."""
        words = super().sample({name: value for name, value in row.items() if name != self.image_column}, responds)
        image = row[self.image_column]
        if isinstance(words, str):
            return {"image": image, "question": words, "response": None}
        return {"image": image, "question": words["prompt"], "response": words["response"] or None}

    def fields(self) -> list[str]:
        """Returns the names of the columns of question and response, and of the image."""
        return [*super().fields(), self.image_column]

    def read(self, task: str) -> dict[str, Dataset]:
        """Returns the splits; images by path are opened when they are needed.

        Raises:
            DataError: the file or data set cannot be read, or an image is not there.
        """
        splits = super().read(task)
        if self.path.suffix.lower() == ".json" and not self.path.is_dir():
            splits = {"calibration": next(iter(splits.values()))}
            if self.image_column == "image":
                splits = {split: self._renamed(rows) for split, rows in splits.items()}
        todo = "set images to the folder that the paths start from"
        return {
            split: as_pictures(
                rows, self.image_column, partial(self.roots, task, split), task=task, dataset=self.dataset, todo=todo
            )
            for split, rows in splits.items()
        }

    def roots(self, task: str, split: str) -> list[Path]:
        """Returns the folder ``images`` where it is given, else those that the rows' paths may start from."""
        return super().roots(task, split) if self.images is None else [Path(self.images).expanduser()]

    def _renamed(self, rows: Dataset) -> Dataset:
        known = "image_path" in rows.column_names and "image" not in rows.column_names
        return rows.rename_column("image_path", "image") if known else rows


@dataclass(eq=False, kw_only=True)
class ImageTextCalibration(LanguageCalibration):
    """Calibration data of questions about images, by task.

    Args:
        tasks: task name to its data.
    """

    tasks: dict[str, ImageTextTask] = field(repr=False)  # type: ignore[assignment]
    batch_size: int = 1
    eval_batch_size: int = 8
