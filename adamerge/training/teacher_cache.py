"""Teacher cache: the outputs of each task's expert on the samples of a fit, each computed once and kept in memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adamerge.backbones import Batch, Teacher
from adamerge.backbones.inputs import moved, stack
from adamerge.data.batch_order import Steps
from adamerge.data.samples import Samples
from adamerge.data.teacher_outputs import Kept, Teach, compact, expanded
from adamerge.errors import ConfigError
from adamerge.merging.merged_model import MergedModel
from adamerge.task_vectors.memory import Available, size
from adamerge.training.length_groups import by_length
from adamerge.training.strategy import Strategy
from adamerge.training.teachers import Show, Teachers, forward_context


class TeacherCache(Teachers):
    """Outputs of the experts, in memory; filled before a fit, read by the data loader and its workers.

    The teacher of a task is the network filled with the task's expert; each sample that the fit's steps use goes through
    it once, beside others of like length. Only positions that count are kept. Each process keeps the samples of its own part
    of the batches.

    Args:
        top: keep the largest logits alone, so many of them; all when None.
        dtype: of the kept logits, less their largest where it is narrower than the network's; None for the network's own.

    Raises:
        ConfigError: a number is out of range, or an unknown dtype; when a fit begins, that outputs take more memory than
            there is.
    """

    changing = False

    def __init__(self, top: int | None = None, dtype: str | None = None) -> None:
        super().__init__(top, dtype)
        self.found: dict[str, int] = {}
        self._memory: dict[tuple[str, int], Kept] = {}

    def __call__(self, task: str, index: int) -> Teacher:
        """Returns the expert's outputs of a sample, expanded to its positions up to the last that counts.

        Raises:
            KeyError: nothing was.
        """
        return expanded(self._kept(task, index))

    def begin(
        self,
        merged: MergedModel,
        steps: Steps,
        hidden: Sequence[float],
        *,
        show: Show,
        batch_size: int,
        strategy: Strategy,
        default_folder: Path,
    ) -> None:
        """Runs the experts on samples without outputs, without a gradient; leaves the network filled with an expert."""
        start = time.monotonic()
        self.forwards, self.found, self._memory = dict.fromkeys(steps.samples, 0), {}, {}
        coming = {task: self._wanted(task, steps) for task in steps.samples}
        for task, samples in steps.samples.items():
            self._open(task, merged, hidden, str(strategy.precision_plugin.precision), default_folder)
            wanted = coming.pop(task)
            missing = [index for index in wanted if not self._holds(task, index, samples)]
            self.found[task] = len(wanted) - len(missing)
            if missing:
                merged.fill_expert(task)
                missing, positions = by_length(missing, samples)
            for first in range(0, len(missing), batch_size):
                indices = missing[first : first + batch_size]
                inputs = stack([samples[index] for index in indices])
                with torch.no_grad(), forward_context(strategy):
                    encoded = merged(moved(inputs, merged.device), tuple(hidden))
                    output = merged.backbone.output(encoded, task)
                made = compact(output, self.top, self.dtype)
                if first == 0:
                    a_task = _bytes(made) * sum(positions) / max(1, sum(positions[:batch_size]))
                    self._afford(a_task * (1 + sum(map(len, coming.values())) / len(missing)))
                self._keep(task, dict(zip(indices, made, strict=True)), samples)
                self.forwards[task] += len(indices)
        self._close(strategy, steps)
        self.seconds = time.monotonic() - start

    def of_samples(self) -> Teach:
        """Returns the cache itself: the data loader asks it for each sample."""
        return self

    def taught(self, batch: Mapping[str, Batch]) -> dict[str, Batch]:
        """Returns the batch as it is: the data loader has put the outputs into it."""
        return dict(batch)

    def in_memory(self) -> TeacherCache:
        """Returns an empty cache of the same settings, which keeps outputs in memory."""
        return TeacherCache(self.top, self.dtype)

    def report(self) -> dict[str, Any]:
        """Returns forward passes of this process, samples that were there already, bytes and seconds, for the summary."""
        kept = _bytes(self._memory.values())
        return {"forwards": self.forwards, "found": self.found, "bytes": kept, "seconds": round(self.seconds, 3)}

    def _open(
        self, task: str, merged: MergedModel, hidden: Sequence[float], precision: str, default_folder: Path
    ) -> None:
        return

    def _wanted(self, task: str, steps: Steps) -> list[int]:
        """Returns the samples that this process must have run: those of its own part of the batches."""
        mine = slice(steps.rank, None, steps.world_size)
        return sorted({index for step in range(steps.total) for index in steps.indices(task, step)[mine]})

    def _holds(self, task: str, index: int, samples: Samples) -> bool:
        return False

    def _afford(self, nbytes: float) -> None:
        """Refuses outputs that this machine's memory does not hold, before most of them are computed.

        Args:
            nbytes: that all outputs will take, as far as the first batch tells.

        Raises:
            ConfigError: it is more than what is available.
        """
        there = Available.on(torch.device("cpu")).host
        if there is not None and nbytes > there:
            raise ConfigError(
                f"the experts' outputs would take about {size(int(nbytes))} of memory, {size(there)} are available",
                todo="--model.teachers=TeacherFiles keeps them in files, with --model.teachers.top=64 the largest logits"
                " alone; --model.teachers=TeachersAhead computes them every few steps anew",
            )

    def _keep(self, task: str, entries: Mapping[int, Kept], samples: Samples) -> None:
        self._memory |= {(task, index): kept for index, kept in entries.items()}

    def _kept(self, task: str, index: int) -> Kept:
        return self._memory[task, index]

    def _close(self, strategy: Strategy, steps: Steps) -> None:
        return


def _bytes(outputs: Iterable[Kept]) -> int:
    return sum(value.nbytes for kept in outputs for value in kept.values())
