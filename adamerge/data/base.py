"""Calibration data: disjoint splits of every task, for fitting without labels and for reporting with them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, ClassVar, Self

from torch.utils.data import DataLoader

from adamerge.backbones import Backbone, Batch, Inputs, Task
from adamerge.data.batch_order import Steps
from adamerge.data.calibration_rows import calibration_rows
from adamerge.data.checks import check
from adamerge.data.class_labels import LABEL, LabelPlace
from adamerge.data.dataset import Dataset
from adamerge.data.drawn_splits import needed
from adamerge.data.held_out import CALIBRATION, HELD_OUT, calibration_splits
from adamerge.data.labels import ClassLabels, Labelling, Labels
from adamerge.data.loaders import TrainingLoop, eval_loader, running, train_loader
from adamerge.data.metrics import Metric
from adamerge.data.notices import notices
from adamerge.data.pictures import unchanged, with_eight_bits
from adamerge.data.protocol import protocol
from adamerge.data.samples import Samples, skipped_lines
from adamerge.data.settings import CalibrationSettings
from adamerge.data.teacher_outputs import Teach
from adamerge.errors import ConfigError
from adamerge.objectives import Course


class Calibration(CalibrationSettings, ABC):
    """Unlabelled batches of every task for fitting; labelled validation and test splits for reporting.

    A kind of data says which tasks there are and loads their splits; what else it may say has a default.

    Attributes:
        labelling: where the labels of the samples are.
        loop: that draws the batches of a fit; None while there is no fit.
    """

    labelling: ClassVar[Labelling] = ClassLabels()

    def __post_init__(self) -> None:
        """Begins with nothing loaded, nothing to serve and no fit."""
        super().__post_init__()
        self.loop: TrainingLoop | None = None
        self._splits: dict[str, dict[str, Dataset]] = {}
        self._samples: dict[tuple[str, str], Samples] = {}
        self._calibration: dict[str, dict[str, Dataset]] = {}  # of what the backbone can use
        self._backbone: Backbone | None = None
        self._change: Callable[[Any], Any] = unchanged
        self._teach: Teach | None = None

    @property
    @abstractmethod
    def tasks(self) -> Mapping[str, Task]:
        """Class names and templates of every task."""

    @abstractmethod
    def load(self, task: str) -> Mapping[str, Dataset]:
        """Returns the splits of a task, disjoint: train, calibration, validation, test; one that is not used may lack."""

    def columns(self, task: str) -> tuple[str, ...]:
        """Returns the names of the columns that make a sample of a task."""
        return ("image",)

    def label_column(self, task: str) -> str:
        """Returns the name of the column of a task's labels, as its data set calls it."""
        return LABEL

    def read(self, task: str, split: str, value: Any) -> Any:
        """Returns the sample that the backbone preprocesses, from a row's value.

        Args:
            task: whose sample it is.
            split: that the sample is in.
            value: of the one column that makes a sample, or a mapping of several; pictures are 8-bit RGB.
        """
        return value

    def origin(self, task: str, split: str) -> str:
        """Returns where a split comes from, in a word, for people; empty where ``load`` does not say."""
        return ""

    @property
    def metric(self) -> Metric:
        """Returns the metric by which predictions are scored."""
        return self.labelling.metric

    @property
    def fitted(self) -> list[str]:
        """Names of the tasks that are calibrated on: all, or ``only`` those.

        Raises:
            ConfigError: ``only`` is empty or names a task that there is not.
        """
        unknown = [task for task in self.only or () if task not in self.tasks]
        if unknown or (self.only is not None and not self.only):
            raise ConfigError(
                f"data: only names '{unknown[0]}', which is no task" if unknown else "data: only names no task",
                expected=f"of {list(self.tasks)}",
                got=list(self.only or ()),
            )
        return [task for task in self.tasks if self.only is None or task in self.only]

    @property
    def protocol(self) -> dict[str, Any]:
        """Returns which data a run used, for its summary and the model's card."""
        return protocol(self)

    def at_hand(self, task: str) -> bool:
        """Returns whether a task's rows are on this machine, so that ``load`` neither downloads nor builds them."""
        return False

    def changed(self, change: Callable[[Any], Any]) -> Self:
        """Returns the same data whose pictures go through ``change`` before a network's own preprocessing."""
        other = copy.copy(self)
        other._change, other._samples = change, {}
        return other

    def serve(self, backbone: Backbone) -> None:
        """Preprocesses samples as this backbone wants them, from here on."""
        self._backbone = backbone

    def teach(self, teach: Teach | None) -> None:
        """Puts what the experts make of the samples into the batches of the next fit."""
        self._teach = teach

    def check(self, backbone: Backbone, validated: bool = True) -> None:
        """Reads all that a fit of this backbone is going to read, as ``adamerge.data.checks`` says, and refuses faults."""
        check(self, backbone, validated)

    def notices(self, experts: Collection[str] = ()) -> list[str]:
        """Returns what a fit of these experts tells of its data before it begins, as ``adamerge.data.notices`` says."""
        return notices(self, experts)

    def splits(self, task: str) -> dict[str, Dataset]:
        """Returns what ``load`` gives for a task, loaded once."""
        if task not in self._splits:
            self._splits[task] = dict(self.load(task))
        return self._splits[task]

    def rows(self, task: str, split: str) -> Dataset:
        """Returns the rows of a split; of ``calibration`` as the settings say which, and as ``held_out`` those of these.

        Raises:
            DataError: the split is missing or empty, or of ``shots`` a class has too few samples or a label is no class.
        """
        if split not in calibration_splits(self):
            return needed(self.splits(task), split, task)
        if self._backbone is None:
            return calibration_rows(self, task)[split]
        if task not in self._calibration:
            self._calibration[task] = calibration_rows(self, task, self._preprocess(task, split))
        return self._calibration[task][split]

    def samples(self, task: str, split: str) -> Samples:
        """Returns the preprocessed samples of a split, decoded once however many loaders use them."""
        if self._backbone is None:
            raise ConfigError("the data have no backbone to preprocess for", todo="call data.serve(backbone) first")
        if (task, split) not in self._samples:
            self._samples[task, split] = Samples(
                self.rows(task, split),
                self.columns(task),
                self._preprocess(task, split),
                f"task '{task}', {split} split",
                workers=self.workers,
                unusable_share=self.unusable_share,
            )
        return self._samples[task, split]

    def _preprocess(self, task: str, split: str) -> Callable[[Any], Inputs]:
        assert self._backbone is not None
        preprocess, change = self._backbone.preprocess, self._change
        split = CALIBRATION if split == HELD_OUT else split  # what is held out is read as what is not
        return lambda value: preprocess(self.read(task, split, with_eight_bits(value, change)))

    def count(self, task: str, split: str) -> int:
        """Returns the number of samples of a split where it was read, else of its rows."""
        read = self._samples.get((task, split))
        return len(self.rows(task, split) if read is None else read)

    def skipped_lines(self, split: str) -> list[str]:
        """Returns how many rows of a split are skipped, and the first of them with the reasons, a line for each such task."""
        return skipped_lines({key: samples for key, samples in self._samples.items() if key[1] == split})

    def skipped(self, split: str) -> dict[str, int]:
        """Returns the number of rows of a split that are no samples, of each task that was read and has some."""
        counts = {task: len(samples.skipped) for (task, name), samples in self._samples.items() if name == split}
        return {task: counts[task] for task in self.tasks if counts.get(task)}

    def label_place(self, task: str, split: str) -> LabelPlace:
        """Returns whose the labels of a split are, and what they may be."""
        return LabelPlace(task, split, tuple(self.tasks[task].classnames), self.label_column(task))

    def labelled_tasks(self, split: str) -> list[str]:
        """Returns the tasks whose split of this name has rows and labels; of the validation split, those that are fitted."""
        tasks = self.fitted if split == "validation" else self.tasks
        splits = {task: self.splits(task).get(split) for task in tasks}
        return [task for task, rows in splits.items() if rows is not None and len(rows) and self.labelling.has(rows)]

    def labels(self, task: str, split: str) -> Labels:
        """Returns the labels of a split's samples, in their order; of all its rows while there is no backbone.

        Raises:
            DataError: it has none, or one is no class.
        """
        samples, where, rows = partial(self.samples, task, split), self.label_place(task, split), self.rows(task, split)
        self.labelling.check(rows, where)
        if self._backbone is not None and samples().skipped:
            rows = rows.select(samples().numbers)
        return self.labelling.of(rows, samples, self._backbone, where)

    def course(self) -> Course:
        """Returns what the loop's fit is going to see, without labels."""
        samples = {task: self.samples(task, "calibration") for task in self.fitted}
        classes = {task: len(self.tasks[task].classnames) for task in self.fitted}
        return Course(samples, classes, running(self.loop).max_steps, self.batch_size)

    def steps(self) -> Steps:
        """Returns the batches of the loop's fit.

        Raises:
            ConfigError: there is no loop, or it has no length.
        """
        loop = running(self.loop)
        return Steps(
            {task: self.samples(task, "calibration") for task in self.fitted},
            {task: self.labels(task, "calibration") for task in self.fitted} if self.labelled else None,
            batch_size=self.batch_size,
            seed=self.seed,
            total=loop.max_steps,
            rank=loop.global_rank,
            world_size=loop.world_size,
            teach=self._teach,
        )

    def train_dataloader(self) -> DataLoader[dict[str, Batch]]:
        """Returns a loader of one batch of every task per step, from the first step that is not done."""
        return train_loader(self.steps(), running(self.loop), self.workers)

    def eval_dataloader(self, task: str, split: str) -> DataLoader[Any]:
        """Returns a loader of labelled batches of one task, in the order of its rows."""
        samples, labels = self.samples(task, split), self.labels(task, split)
        return eval_loader(samples, labels, self.eval_batch_size, self.workers)
