"""Image tasks from Hugging Face data sets: on disk, in folders of images, or on the Hub."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from adamerge.data.classes import ClassCalibration, ClassTable
from adamerge.data.dataset import Dataset
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
        """Returns the column of the image, by the name that it has here."""
        return {self.image_column: "image"}

    def read(self, task: str) -> dict[str, Dataset]:
        """Returns the splits; pictures by path are opened when they are needed.

        Raises:
            DataError: the data set cannot be read, or a picture is not there.
        """
        return {
            split: as_pictures(
                rows, self.image_column, partial(self.roots, task, split), task=task, dataset=self.dataset
            )
            for split, rows in super().read(task).items()
        }


@dataclass(eq=False, kw_only=True)
class ImageCalibration(ClassCalibration[ImageTask]):
    """Image tasks by name.

    Args:
        tasks: task name to its data.
    """

    tasks: dict[str, ImageTask] = field(repr=False)
