"""Inputs for a solver that sees them: unlabelled samples through each expert and through the merge so far, in one copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch

from adamerge.backbones import Backbone, Inputs
from adamerge.backbones.capture import Entered, GroupCapture
from adamerge.backbones.inputs import count, moved, rows
from adamerge.data import Calibration
from adamerge.data.batch_order import Steps
from adamerge.merging.merged_model import MergedModel
from adamerge.parametrizations import StartAlone
from adamerge.solvers.sequential import Group
from adamerge.task_vectors.start import StartOf, no_start
from adamerge.task_vectors.storage import Disk
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.block_shortcuts import Shortcuts


class SampledInputs:
    """Runs samples of the calibration splits through one network, which is filled with an expert or with the merge so far.

    The merge is the base and what has been solved, which is read from the file that it is written to: beside the network
    there is one tensor in memory, and no expert. Samples are those that a fit of these data begins with, and have no labels.
    A pass ends where what is asked for is known, and begins at the first block that has changed since the one before it; of
    each model and batch what entered that block is kept on the device.

    Args:
        backbone: the network, which may have been another merged model's.
        vectors: base and experts.
        data: that serve the backbone.
        samples: of each task, at most.
        device: where the network runs.

    Attributes:
        merged: the network and what it is filled with.
        counts: samples of each task.
    """

    def __init__(
        self, backbone: Backbone, vectors: TaskVectors, data: Calibration, *, samples: int, device: torch.device
    ) -> None:
        self.data, self.counts = data, dict[str, int]()
        self._batches: dict[str, list[Inputs]] = {}
        for task in data.fitted:
            every = data.samples(task, "calibration")
            size = self.counts[task] = min(samples, len(every))
            drawn = Steps({task: every}, None, batch_size=size, seed=data.seed, total=1).part(task, 0).inputs
            firsts = range(0, count(drawn), data.eval_batch_size)
            self._batches[task] = [rows(drawn, slice(first, first + data.eval_batch_size)) for first in firsts]
        self._written: StartOf = no_start
        vectors = vectors.begun(lambda name: self._written(name))
        self.merged = MergedModel(backbone, vectors, StartAlone(vectors), Disk()).to(device)
        self._holds: tuple[str, ...] = ()
        self._shortcuts: Shortcuts | None = Shortcuts(backbone.network)

    @property
    def tasks(self) -> list[str]:
        """Returns the tasks that there are samples of."""
        return list(self._batches)

    @property
    def protocol(self) -> dict[str, Any]:
        """Returns which data are used, for the files that are written and the card."""
        return {**self.data.protocol, "solver_samples": self.counts}

    @cached_property
    def groups(self) -> list[Group]:
        """Returns the network's linear maps that run once, in the order in which they do on a sample."""
        self._fill(("base",), partial(self.merged.fill, self.merged.task_vectors.base.__getitem__))
        sample = moved(rows(self._batches[self.tasks[0]][0], slice(0, 1)), self.merged.device)
        groups = self.merged.backbone.linear_maps(sample)
        if not self._agree(groups, sample):
            self._shortcuts = None
        return groups

    def begin(self, written: StartOf) -> None:
        """Merges what has been written, from here on."""
        self._written = written
        if self._shortcuts is not None:
            self._shortcuts.forget()

    def of_expert(self, group: Group, task: str) -> Iterator[Entered]:
        """Yields, batch by batch, what there is at linear maps when the task's own expert runs."""
        for number, batch in enumerate(self._batches[task]):
            self._fill(("expert", task), partial(self.merged.fill_expert, task))
            yield self._entered(group, batch, ("expert", task, number))

    def of_merge(self, group: Group, task: str) -> Iterator[Entered]:
        """Yields the same when a network runs that is merged of what has been solved, and of the base's other tensors."""
        self._holds = ()  # more has been solved since
        for number, batch in enumerate(self._batches[task]):
            self._fill(("merge",), self.merged.merge)
            yield self._entered(group, batch, ("merge", task, number))

    @torch.no_grad()
    def _fill(self, wanted: tuple[str, ...], fill: Callable[[], None]) -> None:
        """Fills the network, unless it holds that already: passes of several models may take turns, batch by batch."""
        if self._holds != wanted:
            fill()
            self._holds = wanted

    @torch.no_grad()
    def _entered(self, group: Group, batch: Inputs, key: tuple[str, str, int]) -> Entered:
        """Returns what there is at linear maps when the network runs as it is filled.

        Groups are asked for in the network's order, and what comes before one stays as it is: of the blocks before it none
        runs twice. Whoever asks for an earlier one has them all run again.
        """
        run = partial(self.merged, moved(batch, self.merged.device))
        capture = self._captured(run, group, batch, key)
        if not capture.complete and self._shortcuts is not None:
            self._shortcuts.forget()
            capture = self._captured(run, group, batch, key)
        return capture.entered

    def _captured(
        self, run: Callable[[], object], group: Group, batch: Inputs, key: tuple[str, str, int] | None
    ) -> GroupCapture:
        with self.merged.backbone.capture_group(group, batch) as capture:
            if key is None or self._shortcuts is None:
                run()
            else:
                with self._shortcuts.passing(key, lambda: capture.reached):
                    run()
        return capture

    @torch.no_grad()
    def _agree(self, groups: Sequence[Group], sample: Inputs) -> bool:
        """Returns whether passes that leave out settled blocks find what whole passes do, bit by bit, on a sample."""
        run, key = partial(self.merged.backbone.encode, sample), ("base", "", 0)
        for group in groups:
            whole, short = (self._captured(run, group, sample, one) for one in (None, key))
            if not short.complete or not _equal(whole.entered, short.entered):
                return False
        return True


def _equal(one: Entered, other: Entered) -> bool:
    streams = all(torch.equal(value, other.streams[name]) for name, value in one.streams.items())
    return torch.equal(one.inputs, other.inputs) and streams
