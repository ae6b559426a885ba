"""No data: what methods without an objective are given, which merge base and experts alone."""

from __future__ import annotations

from collections.abc import Mapping

from adamerge.backbones import Task
from adamerge.data.base import Calibration
from adamerge.data.dataset import Dataset
from adamerge.errors import DataError


class NoData(Calibration):
    """Stands where a pool has no data: there are no tasks. What others take of batches and splits is taken, and not used."""

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Returns no tasks, since nothing is learned."""
        return {}

    def load(self, task: str) -> Mapping[str, Dataset]:
        """Refuses to load: there are no data.

        Raises:
            DataError: always.
        """
        raise DataError(f"task '{task}': there are no data", todo="give the pool a data section")
