"""Automatic storage: the fastest exact one that fits what is left of the memory."""

from __future__ import annotations

import logging

import torch

from adamerge.errors import ConfigError
from adamerge.task_vectors.memory import FP32, Available, Memory, Sizes
from adamerge.task_vectors.storage import MARGIN, Disk, Pinned, Resident, Storage
from adamerge.task_vectors.task_vectors import TaskVectors

log = logging.getLogger(__name__)


class Automatic(Storage):
    """The fastest exact storage that fits: on the device, else in pinned memory, else on disk.

    It fits when a fraction of the memory that is available stays free beside it and the gradient of the merged copy: what
    activations take is not known before. Never rounds deltas: that is for you to say, with ``Resident`` or ``LowBit``.

    Args:
        margin: that fraction.

    Raises:
        ConfigError: margin is not in [0, 1).
    """

    def __init__(self, margin: float = MARGIN) -> None:
        if not 0 <= margin < 1:
            raise ConfigError(f"Automatic: margin must be in [0, 1), got {margin}")
        self.margin = margin

    def place(self, vectors: TaskVectors, device: torch.device) -> TaskVectors:
        """Places task vectors as the first storage does that fits beside the gradient of the whole copy."""
        chosen = self._now(Sizes.of(vectors), device)
        log.info("storage: %s", chosen)
        return chosen.place(vectors, device)

    def chosen(self, sizes: Sizes, device: torch.device, there: Available, beside: Memory) -> Storage:
        """Returns the first storage that fits into the memory that is there.

        Args:
            sizes: of the task vectors.
            device: of the merges.
            there: memory that is available.
            beside: what else will be taken of it.
        """
        for storage in self.candidates(device):
            if (storage.needs(sizes, device) + beside).fits(there, self.margin):
                return storage
        return Disk()

    def candidates(self, device: torch.device) -> list[Storage]:
        """Returns the exact storages, the fastest first."""
        return [Resident(), Disk()] if device.type == "cpu" else [Resident(), Pinned(), Disk()]

    def footprint(self, sizes: Sizes, device: torch.device) -> Memory:
        """Returns what stays in memory with the storage that would be chosen now."""
        return self._now(sizes, device).footprint(sizes, device)

    def transient(self, sizes: Sizes, device: torch.device) -> Memory:
        """Returns what one tensor needs for a moment with the storage that would be chosen now."""
        return self._now(sizes, device).transient(sizes, device)

    def _now(self, sizes: Sizes, device: torch.device) -> Storage:
        return self.chosen(sizes, device, Available.on(device), Memory.of(FP32 * sizes.merged, device))
