"""The testbed's data module: the image tasks as calibration, validation and test splits."""

from __future__ import annotations

from collections.abc import Mapping

import datasets

from adamerge.backbones import Task
from adamerge.data import Calibration
from adamerge.testbed.image_tasks import IMAGE_TASKS, load_image_task


class TestbedImages(Calibration):
    """Seven small image tasks, built from packages on first use and cached; see ``adamerge/testbed/README.md``."""

    __test__ = False  # not a test case, whatever pytest makes of the name

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Class names and templates of every task."""
        return IMAGE_TASKS

    def load(self, task: str) -> Mapping[str, datasets.Dataset]:
        """The task's four splits, disjoint by construction."""
        return load_image_task(task)
