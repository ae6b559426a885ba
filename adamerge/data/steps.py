"""Steps: samples decoded once, and batches of every task in an order made of (seed, step) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from adamerge.backbones import IGNORED, Batch, Inputs
from adamerge.backbones.inputs import stack, stack_tensors
from adamerge.data.teachers import Teach, stack_teachers
from adamerge.errors import ConfigError, DataError


def seed_of(*parts: object) -> int:
    """A 63-bit seed from anything printable; the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


class Samples(Dataset[Inputs]):
    """Preprocessed samples of one split, each decoded at its first use and kept in memory.

    Args:
        rows: of the split.
        columns: that make a sample: of one, its value is preprocessed, of several, a mapping of them.
        preprocess: one decoded sample to tensors; images are all of one shape, sequences may differ in length.
        where: task and split, for errors.
        shared: keep samples that are one tensor in memory that worker processes share.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        columns: Sequence[str],
        preprocess: Callable[[Any], Inputs],
        where: str,
        shared: bool = False,
    ) -> None:
        # only these columns: the labels of unlabelled data are never read
        self.rows, self.columns = rows.select_columns(list(columns)), tuple(columns)
        self.preprocess, self.where = preprocess, where
        self._decoded: dict[int, Inputs] = {}
        self._shared: tuple[Tensor, Tensor] | None = None
        first = self._decoded[0] = self._decode(0)
        if shared and isinstance(first, Tensor):
            values = torch.empty(len(rows), *first.shape, dtype=first.dtype).share_memory_()
            self._shared = values, torch.zeros(len(rows), dtype=torch.bool).share_memory_()
            self._shared[0][0], self._shared[1][0] = first, True

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Inputs:
        index = int(index)
        if self._shared is not None and self._shared[1][index]:
            return self._shared[0][index]
        if index not in self._decoded:
            decoded, first = self._decode(index), self._decoded[0]
            if isinstance(first, Tensor) and isinstance(decoded, Tensor) and decoded.shape != first.shape:
                raise DataError(
                    f"{self.where}: row {index} has another shape than row 0 after preprocessing",
                    expected=tuple(first.shape),
                    got=tuple(decoded.shape),
                )
            if self._shared is not None and isinstance(decoded, Tensor):
                self._shared[0][index], self._shared[1][index] = decoded, True
                return decoded
            self._decoded[index] = decoded
        return self._decoded[index]

    def _decode(self, index: int) -> Inputs:
        try:
            row = self.rows[index]
            return self.preprocess(row[self.columns[0]] if len(self.columns) == 1 else row)
        except Exception as error:
            raise DataError(
                f"{self.where}: row {index} cannot be read: {error}", todo="remove the row, or repair the file"
            ) from error


class Classes(Dataset[Tensor]):
    """The labels of a split that names a class for each sample."""

    def __init__(self, classes: Sequence[int]) -> None:
        self._classes = torch.tensor(list(classes), dtype=torch.int64)  # some data sets have truth values

    def __len__(self) -> int:
        return len(self._classes)

    def __getitem__(self, index: int) -> Tensor:
        return self._classes[index]


class Tokens(Dataset[Tensor]):
    """The labels of a split for a language model: the tokens of the samples themselves.

    Args:
        samples: of the split.
        labels: a preprocessed sample to its labels.
    """

    def __init__(self, samples: Samples, labels: Callable[[Inputs], Tensor]) -> None:
        self.samples, self.labels = samples, labels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        return self.labels(self.samples[index])


Labels = Classes | Tokens


class Steps(Dataset[dict[str, Batch]]):
    """Step number to the batch of that step: a slice of every task's samples, in an order made of (seed, step) alone.

    Args:
        samples: of each task.
        labels: of each task; None for unlabelled objectives.
        batch_size: samples per task and step, over all processes.
        seed: of the order.
        total: number of steps.
        rank: of this process; it takes every ``world_size``-th sample of the batch.
        world_size: number of processes.
        teach: what the experts make of the samples; None for objectives that are not taught.

    Raises:
        ConfigError: there are more processes than samples in a batch.
    """

    def __init__(
        self,
        samples: Mapping[str, Samples],
        labels: Mapping[str, Labels] | None,
        batch_size: int,
        seed: int,
        total: int,
        rank: int = 0,
        world_size: int = 1,
        teach: Teach | None = None,
    ) -> None:
        if world_size > batch_size:
            raise ConfigError(
                f"data: batch_size {batch_size} is shared by {world_size} processes",
                expected=f"at least {world_size}",
                got=batch_size,
            )
        self.samples, self.labels, self.batch_size, self.seed = samples, labels, batch_size, seed
        self.total, self.rank, self.world_size, self.teach = total, rank, world_size, teach
        self._orders: dict[tuple[str, int], Tensor] = {}

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, step: int) -> dict[str, Batch]:
        batch = {}
        for task, samples in self.samples.items():
            indices = self.indices(task, step)[self.rank :: self.world_size]
            inputs, labels, teacher = stack([samples[index] for index in indices]), None, None
            if self.labels is not None:
                labels = stack_tensors([self.labels[task][index] for index in indices], IGNORED)
            if self.teach is not None:
                teacher = stack_teachers([self.teach(task, index) for index in indices])
            batch[task] = Batch(inputs, labels, teacher, torch.tensor(indices), step)
        return batch

    def indices(self, task: str, step: int) -> list[int]:
        """Sample numbers of a step: consecutive places in an endless row of shuffled passes over the samples."""
        first, count = step * self.batch_size, len(self.samples[task])
        places = range(first, first + self.batch_size)
        return [int(self._order(task, place // count)[place % count]) for place in places]

    def _order(self, task: str, epoch: int) -> Tensor:
        if (task, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key[0] != task or key[1] >= epoch - 1}
            generator = torch.Generator().manual_seed(seed_of(self.seed, task, epoch))
            self._orders[task, epoch] = torch.randperm(len(self.samples[task]), generator=generator)
        return self._orders[task, epoch]


class StepSampler(Sampler[int]):
    """Steps from the first that is not done yet; a resumed run goes on where it was.

    Args:
        first: asked when an epoch begins.
        total: number of steps, done ones included: Lightning counts them.
    """

    def __init__(self, first: Callable[[], int], total: int) -> None:
        self.first, self.total = first, total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first(), self.total))


class Labelled(Dataset[tuple[Inputs, Tensor]]):
    """Samples with their labels, for evaluation."""

    def __init__(self, samples: Samples, labels: Labels) -> None:
        self.samples, self.labels = samples, labels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Inputs, Tensor]:
        return self.samples[index], self.labels[index]


def labelled_batch(items: list[tuple[Inputs, Tensor]]) -> Batch:
    """Items of ``Labelled`` to a batch."""
    return Batch(stack([inputs for inputs, _ in items]), stack_tensors([label for _, label in items], IGNORED))
