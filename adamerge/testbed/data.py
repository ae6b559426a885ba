"""The testbeds' data modules: their tasks as calibration, validation and test splits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from adamerge.backbones import Task
from adamerge.data import Calibration, Vocabulary
from adamerge.data.dataset import Dataset
from adamerge.data.labels import TokenLabels
from adamerge.testbed.cache import is_built

# what makes the tasks is imported where it is used: it loads libraries that reading a configuration does not need


class TestbedImages(Calibration):
    """Seven small image tasks, built from packages on first use and cached; see ``adamerge/testbed/README.md``."""

    __test__ = False  # not a test case, whatever pytest makes of the name

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Returns class names and templates of every task."""
        from adamerge.testbed.image_tasks import IMAGE_TASKS

        return IMAGE_TASKS

    def load(self, task: str) -> Mapping[str, Dataset]:
        """Returns the task's four splits, disjoint by construction."""
        from adamerge.testbed.image_tasks import load_image_task

        return load_image_task(task)

    def at_hand(self, task: str) -> bool:
        """Returns whether the task has been built."""
        return is_built(partial(self.splits, task))


class TestbedText(Calibration):
    """Seven questions about texts of installed packages, built on first use and cached."""

    __test__ = False

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Returns class names and templates of every task."""
        from adamerge.testbed.text_tasks import TEXT_TASKS

        return TEXT_TASKS

    def columns(self, task: str) -> tuple[str, ...]:
        """Returns the name of the one column that makes a sample."""
        return ("text",)

    def load(self, task: str) -> Mapping[str, Dataset]:
        """Returns the task's four splits, disjoint by construction."""
        from adamerge.testbed.text_tasks import load_text_task

        return load_text_task(task)

    def at_hand(self, task: str) -> bool:
        """Returns whether the task has been built."""
        return is_built(partial(self.splits, task))


class TestbedLanguage(Calibration):
    """Four domains of text for a language model, built from packages on first use and cached."""

    __test__ = False
    labelling = TokenLabels()

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Returns the domains; a language model needs no words for its heads."""
        from adamerge.testbed.causal_tasks import CAUSAL_TASKS

        return {task: Vocabulary((), ()) for task in CAUSAL_TASKS}

    def columns(self, task: str) -> tuple[str, ...]:
        """Returns the name of the one column that makes a sample."""
        return ("text",)

    def load(self, task: str) -> Mapping[str, Dataset]:
        """Returns the domain's four splits, disjoint by construction."""
        from adamerge.testbed.causal_tasks import load_causal_task

        return load_causal_task(task)

    def at_hand(self, task: str) -> bool:
        """Returns whether the task has been built."""
        return is_built(partial(self.splits, task))
