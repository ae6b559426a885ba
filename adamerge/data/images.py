"""Image tasks from Hugging Face data sets: on disk, in folders of images, or on the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import datasets

from adamerge.data.classes import ClassCalibration, ClassTable
from adamerge.data.picture_paths import as_pictures


@dataclass
class ImageTask(ClassTable):
    """One task's images and the words for its zero-shot head.

    Args:
        dataset: a folder written by ``save_to_disk``, a folder of images, a data file or a folder of them whose column
            names pictures by their paths, or a Hub id.
        templates: prompts with ``{}`` where the class name goes; the vocabulary's when empty.
        classnames: in label order; the vocabulary's when empty, and without one the data set's own.
        config: of a Hub data set that has several.
        test: name of the split for reporting.
        train: name of the split from which the others are drawn, where the data set lacks them.
        image_column: holds the image, or its path, which starts from the folder of the file that it stands in.
        label_column: holds the label, an integer from 0 on or a class's name.
        vocabulary: of a public task, such as ``sun397``: its class names and templates.
    """

    image_column: str = field(default="image", kw_only=True)

    @property
    def inputs(self) -> dict[str, str]:
        """The image."""
        return {self.image_column: "image"}

    def read(self, task: str) -> dict[str, datasets.Dataset]:
        """The splits, pictures by path opened when they are needed.

        Raises:
            DataError: the data set cannot be read, or a picture is not there.
        """
        return {
            split: as_pictures(rows, self.image_column, partial(self.roots, task, split), task, self.dataset)
            for split, rows in super().read(task).items()
        }


class ImageCalibration(ClassCalibration):
    """Image tasks by name.

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
        test_fraction: float = 0.2,
        shots: int | None = None,
        only: Sequence[str] | None = None,
        unusable_share: float = 0.05,
    ) -> None:
        super().__init__(
            tasks,
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
