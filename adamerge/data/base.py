"""Calibration data: disjoint splits of every task, for fitting without labels and for reporting with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import datasets
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from adamerge.backbones import Backbone, Batch, Inputs, Task
from adamerge.data.batch_order import Labelled, Steps, StepSampler, labelled_batch, seed_of
from adamerge.data.class_labels import LABEL, LabelPlace, begins_at_one, classes_of
from adamerge.data.labels import ClassLabels, Labelling, Labels, shots
from adamerge.data.metrics import Metric
from adamerge.data.notices import notices
from adamerge.data.pictures import with_eight_bits
from adamerge.data.samples import Samples, can_be_used, skipped_lines
from adamerge.data.teacher_outputs import Teach
from adamerge.errors import ConfigError, DataError
from adamerge.objectives import Course

SPLITS = ("train", "calibration", "validation", "test")


class Calibration(LightningDataModule, ABC):
    """Unlabelled batches of every task for fitting; labelled validation and test splits for reporting.

    Args:
        batch_size: samples per task and step, over all processes.
        seed: of the order of batches and of splits that are drawn.
        transductive: calibrate on the inputs of the test split, as the papers do; written into the summary and the card.
        labelled: hand the labels to the objective; needed by labelled objectives, refused by the others.
        calibration_samples: use so many of each task's calibration samples; all when None.
        eval_batch_size: samples per batch in validation and test.
        workers: processes that decode; 0 decodes in the main process.
        shots: calibrate on so many samples of each class, drawn by ``seed``; needs ``labelled``.
        only: calibrate and validate on these tasks alone, though the pool has experts of others; all when None.
        unusable_share: of a split's rows that may be skipped because nothing can be made of them.

    Raises:
        ConfigError: a number is out of range, or shots of data whose labels may not be read.
    """

    labelling: Labelling = ClassLabels()

    def __init__(
        self,
        batch_size: int = 16,
        seed: int = 0,
        transductive: bool = False,
        labelled: bool = False,
        calibration_samples: int | None = None,
        eval_batch_size: int = 256,
        workers: int = 0,
        shots: int | None = None,
        only: Sequence[str] | None = None,
        unusable_share: float = 0.05,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("workers", workers, 0),
        ):
            if value < least:
                raise ConfigError(f"data: {name} must be at least {least}, got {value}")
        if calibration_samples is not None and calibration_samples < 1:
            raise ConfigError(f"data: calibration_samples must be at least 1, got {calibration_samples}")
        if shots is not None and shots < 1:
            raise ConfigError(f"data: shots must be at least 1, got {shots}")
        if shots is not None and not labelled:
            raise ConfigError(
                "data: shots are chosen by their labels, which an unlabelled objective may not use",
                expected="labelled: true, or calibration_samples instead of shots",
                got="labelled: false",
            )
        if not 0 <= unusable_share <= 1:
            raise ConfigError(f"data: unusable_share must be from 0 to 1, got {unusable_share}")
        self.shots, self.only, self.unusable_share = shots, only, unusable_share
        self.batch_size, self.seed, self.transductive, self.labelled = batch_size, seed, transductive, labelled
        self.calibration_samples, self.eval_batch_size, self.workers = calibration_samples, eval_batch_size, workers
        self._splits: dict[str, dict[str, datasets.Dataset]] = {}
        self._samples: dict[tuple[str, str], Samples] = {}
        self._shots: dict[str, list[int]] = {}
        self._backbone: Backbone | None = None
        self._teach: Teach | None = None

    @property
    @abstractmethod
    def tasks(self) -> Mapping[str, Task]:
        """Class names and templates of every task."""

    @abstractmethod
    def load(self, task: str) -> Mapping[str, datasets.Dataset]:
        """The four splits of a task, disjoint: train, calibration, validation, test; a split that is not used may lack."""

    def columns(self, task: str) -> tuple[str, ...]:
        """The columns that make a sample of a task."""
        return ("image",)

    def label_column(self, task: str) -> str:
        """The column of a task's labels, as its data set calls it."""
        return LABEL

    def read(self, task: str, split: str, value: Any) -> Any:
        """What the backbone preprocesses, from the value of the one column or a mapping of several; pictures are RGB."""
        return value

    @property
    def metric(self) -> Metric:
        """How predictions are scored."""
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

    def setup(self, stage: str) -> None:
        """Take the preprocessing from the module that is being trained or tested."""
        module: Any = self.trainer.lightning_module if self.trainer is not None else None
        if module is not None:
            self.serve(module.merged.backbone)

    def serve(self, backbone: Backbone) -> None:
        """Preprocess samples as this backbone wants them."""
        self._backbone = backbone

    def teach(self, teach: Teach | None) -> None:
        """Put what the experts make of the samples into the batches of the next fit."""
        self._teach = teach

    @property
    def protocol(self) -> dict[str, Any]:
        """Which data a run used, for its summary and the model's card."""
        source = "test" if self.transductive else "calibration"
        return {
            "calibration_split": f"{source}, {'labelled' if self.labelled else 'labels never read'}",
            "transductive": self.transductive,
            "labelled": self.labelled,
            "shots": self.shots,
            "calibration_samples": {task: self._count(task, "calibration") for task in self.fitted},
            "test_samples": {task: self._count(task, "test") for task in self.tasks if "test" in self.splits(task)},
            "seed": self.seed,
            **({"skipped_rows": skipped} if (skipped := self.skipped("calibration")) else {}),
        }

    def rows(self, task: str, split: str) -> datasets.Dataset:
        """The rows of a split; those of ``calibration`` after ``transductive``, ``calibration_samples`` and ``shots``.

        Raises:
            DataError: the split is missing or empty, or of ``shots`` a class has too few samples or a label is no class.
        """
        splits = self.splits(task)
        wanted = "test" if split == "calibration" and self.transductive else split
        found = splits.get(wanted)
        if found is None or len(found) == 0:
            raise DataError(
                f"task '{task}': the {wanted} split is {'missing' if found is None else 'empty'}",
                expected="at least one sample",
                got=f"splits { ({name: len(rows) for name, rows in splits.items()}) }",
                todo=f"give a {wanted} split or file, or more rows of train to draw it from",
            )
        if split == "calibration" and self.calibration_samples is not None:
            generator = torch.Generator().manual_seed(seed_of(self.seed, task, "calibration_samples"))
            found = found.select(torch.randperm(len(found), generator=generator)[: self.calibration_samples].tolist())
        if split == "calibration" and self.shots is not None:
            found = found.select(self._drawn_shots(task, found, self.shots))
        return found

    def _drawn_shots(self, task: str, rows: datasets.Dataset, each: int) -> list[int]:
        """Numbers of the rows that are shots; once there is a backbone, of those that it can use."""
        if task in self._shots:
            return self._shots[task]
        generator = torch.Generator().manual_seed(seed_of(self.seed, task, "shots"))
        where = self.label_place(task, "calibration")
        labels, classes = classes_of(rows, where), len(self.tasks[task].classnames)
        if self._backbone is None:
            return shots(labels, classes, each, generator, str(where))
        preprocess = self._preprocess(task, "calibration")
        usable = partial(can_be_used, rows, self.columns(task), preprocess)
        self._shots[task] = shots(labels, classes, each, generator, str(where), usable)
        return self._shots[task]

    def splits(self, task: str) -> dict[str, datasets.Dataset]:
        """What ``load`` gives for a task, loaded once."""
        if task not in self._splits:
            self._splits[task] = dict(self.load(task))
        return self._splits[task]

    def samples(self, task: str, split: str) -> Samples:
        """Preprocessed samples of a split, decoded once however many loaders use them."""
        if self._backbone is None:
            raise ConfigError("the data have no backbone to preprocess for", todo="call data.serve(backbone) first")
        if (task, split) not in self._samples:
            self._samples[task, split] = Samples(
                self.rows(task, split),
                self.columns(task),
                self._preprocess(task, split),
                f"task '{task}', {split} split",
                self.workers,
                self.unusable_share,
            )
        return self._samples[task, split]

    def _preprocess(self, task: str, split: str) -> Callable[[Any], Inputs]:
        assert self._backbone is not None
        preprocess = self._backbone.preprocess
        return lambda value: preprocess(self.read(task, split, with_eight_bits(value)))

    def check(self, backbone: Backbone, validated: bool = True) -> None:
        """Read all that a fit of this backbone is going to read, before anything is written.

        The labels of the calibration split are read if they are the objective's, those of the validation split if it is
        scored, and those of the test split never: they do not change a fit, and so do not stop it.

        Args:
            backbone: that preprocesses the samples.
            validated: whether the fit scores the validation split.

        Raises:
            ConfigError: class names or templates cannot be used.
            DataError: a split is missing or empty, too many of its rows cannot be used, or a label is no class.
        """
        self.serve(backbone)
        fitted, scored = self.fitted, self.labelled_tasks("validation") if validated else []
        backbone.check_tasks(self.tasks)
        for task in fitted if self.labelled else []:
            self.labelling.check(self.rows(task, "calibration"), self.label_place(task, "calibration"))
        for task in scored:
            self._check_scored(task)
        for task in fitted:
            self.samples(task, "calibration")
        for task in scored:
            self.samples(task, "validation")

    def _check_scored(self, task: str) -> None:
        """Check the validation split's labels; a fit without labels has a way around them."""
        try:
            self.labelling.check(self.rows(task, "validation"), self.label_place(task, "validation"))
        except DataError as error:
            todo = f"{error.todo}; or let the fit score nothing: trainer.limit_val_batches=0"
            raise DataError(error.what, expected=error.expected, got=error.got, todo=todo) from error
        for split, rows in self.splits(task).items():  # few rows may lack the last class, and all splits count alike
            where = self.label_place(task, split)
            if self.labelling.has(rows) and isinstance(self.labelling, ClassLabels) and begins_at_one(rows, where):
                self.labelling.check(rows, where)

    def origin(self, task: str, split: str) -> str:
        """Where a split comes from, in a word, for people; empty where ``load`` does not say."""
        return ""

    def notices(self, experts: Collection[str] = ()) -> list[str]:
        """What a fit tells of its data before it begins, a line each: what was drawn, left out, or cannot be used.

        Args:
            experts: names of those that are merged; a task that has none of its own is told of.
        """
        return notices(self, experts)

    def skipped_lines(self, split: str) -> list[str]:
        """How many rows of a split are skipped, and the first of them with the reasons, a line for each task with any."""
        return skipped_lines({key: samples for key, samples in self._samples.items() if key[1] == split})

    def skipped(self, split: str) -> dict[str, int]:
        """Task to the number of rows of a split that are no samples; tasks whose rows all are, or were not read, lack."""
        found = {task: len(samples.skipped) for (task, name), samples in self._samples.items() if name == split}
        return {task: found[task] for task in self.tasks if found.get(task)}

    def _count(self, task: str, split: str) -> int:
        """Samples of a split as far as it was read, else its rows."""
        read = self._samples.get((task, split))
        return len(self.rows(task, split) if read is None else read)

    def label_place(self, task: str, split: str) -> LabelPlace:
        """Whose the labels of a split are, and what they may be."""
        return LabelPlace(task, split, tuple(self.tasks[task].classnames), self.label_column(task))

    def labelled_tasks(self, split: str) -> list[str]:
        """Tasks whose split of this name exists and has labels; of the validation split, those that are fitted."""
        found = []
        for task in self.fitted if split == "validation" else self.tasks:
            rows = self.splits(task).get(split)
            if rows is not None and len(rows) > 0 and self.labelling.has(rows):
                found.append(task)
        return found

    def labels(self, task: str, split: str) -> Labels:
        """Labels of a split's samples, in their order; of all its rows while there is no backbone to make samples for.

        Raises:
            DataError: it has none, or one is no class.
        """
        samples, where, rows = partial(self.samples, task, split), self.label_place(task, split), self.rows(task, split)
        self.labelling.check(rows, where)
        if self._backbone is not None and samples().skipped:
            rows = rows.select(samples().numbers)
        return self.labelling.of(rows, samples, self._backbone, where)

    def course(self) -> Course:
        """What the trainer's fit is going to see, without labels."""
        assert self.trainer is not None
        samples = {task: self.samples(task, "calibration") for task in self.fitted}
        classes = {task: len(self.tasks[task].classnames) for task in self.fitted}
        return Course(samples, classes, self.trainer.max_steps, self.batch_size)

    def steps(self) -> Steps:
        """The batches of the trainer's fit."""
        trainer = self.trainer
        if trainer is None or trainer.max_steps < 1:
            raise ConfigError(
                "trainer.max_steps is not set: how long should the fit be?", todo="trainer: {max_steps: 500}"
            )
        return Steps(
            {task: self.samples(task, "calibration") for task in self.fitted},
            {task: self.labels(task, "calibration") for task in self.fitted} if self.labelled else None,
            self.batch_size,
            self.seed,
            trainer.max_steps,
            trainer.global_rank,
            trainer.world_size,
            self._teach,
        )

    def train_dataloader(self) -> DataLoader[dict[str, Batch]]:
        """One batch of every task per step."""
        steps, trainer = self.steps(), self.trainer
        assert trainer is not None
        return DataLoader(
            steps,
            batch_size=None,
            sampler=StepSampler(lambda: trainer.global_step, trainer.max_steps),
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """All but the samples' numbers: what is read by them is on the CPU."""
        if not isinstance(batch, dict):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        rest = {task: part._replace(indices=None) for task, part in batch.items()}
        there = super().transfer_batch_to_device(rest, device, dataloader_idx)
        return {task: part._replace(indices=batch[task].indices) for task, part in there.items()}

    def eval_dataloader(self, task: str, split: str) -> DataLoader[Any]:
        """Labelled batches of one task, in the order of its rows."""
        return DataLoader(
            Labelled(self.samples(task, split), self.labels(task, split)),
            batch_size=self.eval_batch_size,
            collate_fn=labelled_batch,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """One loader per task that has a labelled validation split."""
        return [self.eval_dataloader(task, "validation") for task in self.labelled_tasks("validation")]

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """One loader per task that has a labelled test split."""
        return [self.eval_dataloader(task, "test") for task in self.labelled_tasks("test")]
