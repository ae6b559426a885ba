"""Length groups: which samples of a step run together, so that little of what runs is padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adamerge.backbones import Batch, Inputs
from adamerge.backbones.inputs import count, join, rows
from adamerge.backbones.lengths import Lengths, lengths_of, longest_first, padded, positions_of, shortened, varied
from adamerge.data.loaders import BLOCKING
from adamerge.data.samples import Samples
from adamerge.merging.merged_model import MergedModel

PASS_ON_CPU = 64
"""Positions that a pass of its own must save on a CPU: one takes as long as 30 of them on the testbed of texts, and as 66 on
that of language (``tests/benchmarks/language_model.py --texts``)."""

PASS = 4096
"""The same on other devices, an estimate: there a pass of a small network takes as long as its calls, however little runs."""


class Groups(NamedTuple):
    """The samples of a step in the order in which they run, and which of them are one pass.

    Attributes:
        batch: of every task, its samples in that order.
        sizes: of each pass, how many samples of each task are in it; a task's follow one another from pass to pass.
        order: of each task, the places that its samples had before, on the CPU; None where all stay where they are.
    """

    batch: Mapping[str, Batch]
    sizes: Sequence[Mapping[str, int]]
    order: Mapping[str, Tensor] | None = None

    def passes(self) -> Iterator[tuple[Inputs, list[tuple[str, slice, slice]]]]:
        """Yields the inputs of one pass after another, and for each task in it its rows there and its samples in the batch.

        Inputs are padded to the longest sample of their own pass.
        """
        done = dict.fromkeys(self.batch, 0)
        for sizes in self.sizes:
            inputs, parts, first = [], [], 0
            for task, size in sizes.items():
                samples = slice(done[task], done[task] + size)
                inputs.append(_inputs(self.batch[task], samples))
                parts.append((task, slice(first, first + size), samples))
                first, done[task] = first + size, done[task] + size
            yield join(inputs), parts

    def back(self, task: str) -> Tensor | None:
        """Returns where each sample of a task is now, in the order of before, on the batch's device; None where all stay."""
        return None if self.order is None else _sent(self.order[task].argsort(), self.batch[task].inputs)


def grouped(batch: Mapping[str, Batch], most: int | None, merged: MergedModel) -> Groups:
    """Returns the samples of a step in passes of like length.

    From the longest to the shortest, of whatever task, each ``most`` of them are a pass. Such a pass is cut in two where
    that saves most positions of padding, and again, as long as each cut saves more than a pass costs. Samples that are all of
    one length stay in their order, and so do those that are one pass.

    Where a pass merges anew or all processes run it together, none is cut: there are as many as ``most`` asks for, whatever
    the lengths.

    Args:
        batch: of every task, on a device.
        most: samples of a pass; all when None.
        merged: what runs them.
    """
    counts = {task: count(part.inputs) for task, part in batch.items()}
    lengths = _joint(batch, counts)
    places = torch.arange(sum(counts.values()))
    if lengths is None:
        return Groups(batch, [_sizes(part, counts) for part in places.split(most or len(places))])
    positions = positions_of(lengths)
    parts: Sequence[Tensor] = longest_first(positions).split(most or len(places))
    if merged.copy.whole:
        cost = PASS_ON_CPU if merged.device.type == "cpu" else PASS
        parts = [piece for part in parts for piece in _cut(part, positions, cost)]
    parts = [part.sort().values for part in parts]  # tasks one after the other, and each in its order
    order = torch.cat(parts)
    sizes = [_sizes(part, counts) for part in parts]
    if torch.equal(order, places):
        return Groups(batch, sizes)
    return _ordered(batch, order, counts, sizes)


def by_length(indices: Sequence[int], samples: Samples) -> tuple[list[int], list[int]]:
    """Returns samples' numbers, and how long each is, with those of like length side by side.

    Where all are of one length, they are as they were, and of length 1.
    """
    lengths = lengths_of([samples[index] for index in indices])
    if lengths is None:
        return list(indices), [1] * len(indices)
    positions = positions_of(lengths)
    places = longest_first(positions)
    return [indices[place] for place in places.tolist()], positions.sum(dim=0)[places].tolist()


def _joint(batch: Mapping[str, Batch], counts: Mapping[str, int]) -> Lengths | None:
    """Returns the lengths of all tasks' samples, one task's after the other's; None where all are of one length."""
    names = padded(next(iter(batch.values())).inputs, 2)
    lengths: Lengths = {}
    for name in names:
        of_tasks = []
        for task, part in batch.items():
            assert isinstance(part.inputs, dict)
            own = None if part.lengths is None else part.lengths.get(name)
            of_tasks.append(torch.full((counts[task],), part.inputs[name].shape[1]) if own is None else own)
        lengths[name] = torch.cat(of_tasks)
    return varied(lengths)


def _cut(part: Tensor, positions: Tensor, cost: int) -> list[Tensor]:
    """Cuts a pass in two where that saves most, and each of the two again, as long as it saves more than ``cost``.

    Args:
        part: places of its samples, the longest first.
        positions: of all samples, ``(parts of the network, samples)``.
        cost: of a pass, in positions.
    """
    own, size = positions[:, part], len(part)
    if size < 2:
        return [part]
    before = own.cummax(dim=1).values.sum(dim=0)  # as wide is a pass that ends with a sample
    behind = own.flip(1).cummax(dim=1).values.flip(1).sum(dim=0)  # and one that begins with it
    first = torch.arange(1, size)
    saved = size * before[-1] - first * before[:-1] - (size - first) * behind[1:]
    best = int(saved.argmax())
    if saved[best] <= cost:
        return [part]
    return [*_cut(part[: best + 1], positions, cost), *_cut(part[best + 1 :], positions, cost)]


def _sizes(part: Tensor, counts: Mapping[str, int]) -> dict[str, int]:
    """Returns how many of ascending places are in each task that has any there."""
    ends = torch.tensor(list(counts.values())).cumsum(dim=0)
    below = [0, *torch.searchsorted(part, ends).tolist()]
    sizes = {task: below[number + 1] - below[number] for number, task in enumerate(counts)}
    return {task: size for task, size in sizes.items() if size}


def _ordered(
    batch: Mapping[str, Batch], order: Tensor, counts: Mapping[str, int], sizes: Sequence[Mapping[str, int]]
) -> Groups:
    orders, first = {}, 0
    for task, number in counts.items():
        orders[task] = order[(order >= first) & (order < first + number)] - first
        first += number
    there = _sent(torch.cat(list(orders.values())), next(iter(batch.values())).inputs).split(list(counts.values()))
    moved = {task: part.chosen(orders[task], places) for (task, part), places in zip(batch.items(), there, strict=True)}
    return Groups(moved, sizes, orders)


def _sent(places: Tensor, inputs: Inputs) -> Tensor:
    """Returns places on the device of inputs, sent there from where a GPU reads by itself, so that no host waits."""
    device = (inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))).device
    return (places.pin_memory() if device.type == "cuda" else places).to(
        device, non_blocking=device.type not in BLOCKING
    )


def _inputs(batch: Batch, samples: slice) -> Inputs:
    lengths = None if batch.lengths is None else {name: each[samples] for name, each in batch.lengths.items()}
    return shortened(rows(batch.inputs, samples), lengths)
