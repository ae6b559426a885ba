"""Step batches: what the merged model sees of a step's samples, their views, and what the experts make of exactly these."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from adamerge.backbones import Batch
from adamerge.data import Calibration
from adamerge.data.batch_order import seed_of
from adamerge.data.loaders import on_device
from adamerge.merging.merged_model import MergedModel
from adamerge.objectives import Objective, View
from adamerge.objectives.views import seeds_of
from adamerge.precision import exact
from adamerge.training.teachers import Teachers

if TYPE_CHECKING:
    from lightning import Trainer


class StepBatches:
    """Makes of the samples of a step the batch that the step works on, before its first merge.

    Each task's samples become their views, all of this process's at once: a function of the data's seed, task, step and
    sample, and for views that combine samples, of the others. An objective with teachers gets the experts' outputs for these.

    Args:
        merged: the merged model, whose network the experts use too.
        objective: that is taught or not; None where nothing is learned.
        view: of the samples; as they are when None.
        micro_batch: samples per forward pass; all of a task's when None.
    """

    def __init__(
        self, merged: MergedModel, objective: Objective | None, view: View | None, micro_batch: int | None
    ) -> None:
        self._merged, self._micro_batch = merged, micro_batch
        self._taught = objective is not None and objective.taught
        self._hidden = () if objective is None else objective.hidden
        self._given, self._view = view, view  # the latter, in a fit, for the samples of its backbone
        self._teachers: Teachers | None = None
        self._seed = 0

    def begin(self, teachers: Teachers, data: Calibration, trainer: Trainer) -> None:
        """Gets the teachers ready for a fit, before the loader's workers start; tells people what they cost."""
        self._seed, self._teachers = data.seed, None
        self._view = None if self._given is None else self._given.of(self._merged.backbone)
        data.teach(None)
        if not self._taught:
            return
        steps = data.steps()
        teachers.begin(
            self._merged,
            steps,
            self._hidden,
            show=self.view,
            batch_size=self._micro_batch or steps.batch_size,
            strategy=trainer.strategy,
            default_folder=Path(trainer.default_root_dir),
        )
        data.teach(teachers.of_samples())
        self._teachers = teachers
        if trainer.is_global_zero and teachers.told():
            print(teachers.told())

    def __call__(self, batch: Mapping[str, Batch]) -> dict[str, Batch]:
        """Returns views of the samples, with teachers; the network may hold an expert afterwards.

        Args:
            batch: of every task, on the device of the merged model.
        """
        seen = {task: self.view(task, part) for task, part in batch.items()}
        return seen if self._teachers is None else self._teachers.taught(seen)

    def first(self, data: Calibration, device: torch.device) -> dict[str, Batch]:
        """Returns the batch that the first step of a fit works on."""
        return self(on_device(data.steps()[0], device))

    def view(self, task: str, part: Batch) -> Batch:
        """Returns one task's samples of a step as the network sees them."""
        if self._view is None:
            return part
        assert part.indices is not None
        seeds = seeds_of(seed_of(self._seed, task, "views"), part.step, part.indices)
        with exact(self._merged.device):  # a view is the same in every precision
            inputs = self._view(part.inputs, seeds)
        return part._replace(inputs=inputs, lengths=None if self._view.lengthens else part.lengths)
