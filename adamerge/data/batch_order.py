"""Steps: batches of every task in an order made of (seed, step) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from adamerge.backbones import IGNORED, Batch, Inputs
from adamerge.backbones.inputs import stack, stack_tensors
from adamerge.backbones.lengths import lengths_of
from adamerge.data.labels import Labels
from adamerge.data.samples import Samples
from adamerge.data.teacher_outputs import Teach, stack_teachers
from adamerge.errors import ConfigError


def seed_of(*parts: object) -> int:
    """Returns a 63-bit seed from anything printable; the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


class Steps(Dataset[dict[str, Batch]]):
    """Maps a step number to the batch of that step: a slice of every task's samples, in an order made of (seed, step) alone.

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
        *,
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
        return {task: self.part(task, step) for task in self.samples}

    def part(self, task: str, step: int) -> Batch:
        """Returns this process's samples of one task for a step."""
        indices = self.indices(task, step)[self.rank :: self.world_size]
        samples, labels, teacher = [self.samples[task][index] for index in indices], None, None
        if self.labels is not None:
            labels = stack_tensors([self.labels[task][index] for index in indices], IGNORED)
        if self.teach is not None:
            teacher = stack_teachers([self.teach(task, index) for index in indices])
        return Batch(stack(samples), labels, teacher, torch.tensor(indices), step, lengths=lengths_of(samples))

    def indices(self, task: str, step: int) -> list[int]:
        """Returns the sample numbers of a step: epochs are shuffled without replacement, and batches may span them."""
        first, count = step * self.batch_size, len(self.samples[task])
        drawn = range(first, first + self.batch_size)  # counted from the first sample of the first epoch
        return [int(self._order(task, number // count)[number % count]) for number in drawn]

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
    """Pairs each sample with its labels, for evaluation."""

    def __init__(self, samples: Samples, labels: Labels) -> None:
        self.samples, self.labels = samples, labels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Inputs, Tensor]:
        return self.samples[index], self.labels[index]


def labelled_batch(items: list[tuple[Inputs, Tensor]]) -> Batch:
    """Makes a batch of items of ``Labelled``."""
    samples = [inputs for inputs, _ in items]
    labels = stack_tensors([label for _, label in items], IGNORED)
    return Batch(stack(samples), labels, lengths=lengths_of(samples))
