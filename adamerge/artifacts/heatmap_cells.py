"""Cells of the heat map: where each coefficient stands, by the depth and kind that its name tells, and their means."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from adamerge.artifacts.coefficient_table import Table, moments_of

MOST_KINDS = 48  # from which kinds that differ in numbers alone, such as those of a mixture of experts, share a row
INPUTS = {"stem", "pre", "patch", "conv1", "bn1", "wte", "wpe", "token", "pos", "shared"}
OUTPUTS = {"post", "norm", "layernorm", "f", "final", "head", "heads", "fc", "proj", "projection"}
OUTPUTS |= {"classifier", "score", "pooler", "logit"}


class Grid(NamedTuple):
    """Where each group is drawn.

    Attributes:
        rows: kinds of tensors in the network's order; one without a name where blocks have one kind at most.
        columns: numbers of blocks in the order of depth; what is outside of blocks stands before and after them.
        cells: group name to row and column; kinds that differ in numbers alone share one where there are very many.
        stacks: names of what holds the blocks, such as ``visual.transformer.resblocks``.
    """

    rows: list[str]
    columns: list[str]
    cells: dict[str, tuple[int, int]]
    stacks: list[str]


def arrange(groups: Iterable[str], order: Sequence[str] = ()) -> Grid:
    """Finds a row and a column for each group from its name: ``resblocks.10.mlp.c_fc.weight`` is a kind, of block 10.

    The first number of a name is the depth, with the second where blocks stand in stages (``layers.2.blocks.5``). What has
    none stands before or after the blocks: by what it is called (embedding, head), else by its place in the order.

    Args:
        groups: names of tensors, of blocks, or of whatever else shares coefficients.
        order: names of tensors in the network's order; that of ``groups`` where it says nothing.
    """
    ranks = {name: rank for rank, name in enumerate(order)}

    def rank(group: str) -> int:
        if group in ranks:
            return ranks[group]
        return next((at for name, at in ranks.items() if name.startswith(f"{group}.")), len(ranks))

    groups = sorted(groups, key=rank)
    blocks = {group: block for group in groups if (block := _block(group))}
    if len({block.kind for block in blocks.values()}) > MOST_KINDS:
        folded = {group: re.sub(r"\b\d+(?=\.)", "*", block.kind) for group, block in blocks.items()}
        blocks = {group: block._replace(kind=folded[group]) for group, block in blocks.items()}
    stacks = list(dict.fromkeys(block.stack for block in blocks.values()))
    kinds = list(dict.fromkeys(block.kind for block in blocks.values()))
    flat, latest = len(kinds) < 2, -1
    # each row and column: what it is sorted by, and its label
    rows: dict[str, tuple[int, int, str]] = {}
    columns: dict[str, tuple[int, int, tuple[int, ...], str]] = {}
    for at, group in enumerate(groups):
        if group in blocks:
            stack, depth, kind = blocks[group]
            latest = stacks.index(stack)
            rows[group], columns[group] = (1, kinds.index(kind), kind), (latest, 1, depth, ".".join(map(str, depth)))
        else:
            place, side = _outside(group, stacks, latest)
            label = f"{group} (rest)" if any(stack.startswith(f"{group}.") for stack in stacks) else group
            rows[group] = (side, at, group)
            columns[group] = (place, side, (at,), label) if flat else (place, side, (), "in" if side == 0 else "out")
    down = {key: 0 if flat else at for at, key in enumerate(sorted(set(rows.values())))}
    across = {key: at for at, key in enumerate(sorted(set(columns.values())))}
    labels = [label for *_, label in across]
    for place, short in enumerate(_short(stacks) if len(stacks) > 1 else ()):
        first = next(at for key, at in across.items() if key[:2] == (place, 1))
        labels[first] = f"{short} {labels[first]}"
    cells = {group: (down[rows[group]], across[columns[group]]) for group in groups}
    return Grid([""] if flat else [label or "block" for *_, label in down], labels, cells, stacks)


class _Block(NamedTuple):
    """What a name with a number says: ``h.3.mlp.bias`` is of stack ``h``, depth (3,) and kind ``mlp.bias``."""

    stack: str
    depth: tuple[int, ...]
    kind: str


def _block(name: str) -> _Block | None:
    """Reads a name; None where it has no number between its dots."""
    depth = r"\d{1,9}(?:\.(?:(?:blocks|layers)\.)?\d{1,9})*"
    match = re.match(rf"(?:(.*?)\.)??({depth})(?:\.(.*))?$", name, re.ASCII | re.DOTALL)
    return match and _Block(match[1] or "", tuple(map(int, re.findall(r"\d+", match[2]))), match[3] or "")


def _outside(name: str, stacks: Sequence[str], latest: int) -> tuple[int, int]:
    """Which stack a name without a number goes with, and whether before (0) or after (2) its blocks."""
    if not stacks:
        return 0, 0
    words = set(re.split(r"[._]", name.lower()))
    shared = [_common([stack.split("."), name.split(".")]) for stack in stacks]
    nearest = [place for place, length in enumerate(shared) if length == max(shared)]
    if "embed" in name.lower() or words & INPUTS:
        return nearest[0], 0
    if words & OUTPUTS:
        return nearest[-1], 2
    return (nearest[0], 0) if latest < 0 else (latest, 2)


def _short(stacks: Sequence[str]) -> list[str]:
    """What tells the names of stacks apart: ``encoder`` for ``encoder.block`` beside ``decoder.block``."""
    parts = [stack.split(".") for stack in stacks]
    front, back = _common(parts), _common([part[::-1] for part in parts])
    return [".".join(part[front : len(part) - back] or part[front:] or part) for part in parts]


def _common(lists: Iterable[Sequence[str]]) -> int:
    """How many words several lists begin with alike."""
    return len(list(takewhile(lambda words: len(set(words)) == 1, zip(*lists, strict=False))))


class Panel(NamedTuple):
    """What one panel shows, as arrays ``(rows, columns)``.

    Attributes:
        title: above it.
        rows: their labels.
        values: means of what each cell stands for; masked where nothing is, or nothing that was learned and is finite.
        marks: 1 where all was held, 2 where a coefficient is not finite, else 0.
    """

    title: str
    rows: Sequence[str]
    values: Any
    marks: NDArray[numpy.int64]


def panels_of(table: Table, grid: Grid, held: Mapping[str, Sequence[str]]) -> list[Panel]:
    """Makes a panel for each expert and one for their mean; or one with experts as rows, where the grid has a single row."""
    experts = list(next(iter(table.values())))
    sums, counts = numpy.zeros((2, len(experts), len(grid.rows), len(grid.columns)))
    marks = numpy.zeros(sums.shape, numpy.int64)
    for group, cell in grid.cells.items():
        for at, expert in enumerate(experts):
            own, place = table[group][expert], (at, *cell)
            if not all(map(math.isfinite, own)):  # of many, mean and spread
                marks[place] = 2
            elif expert in held.get(group, ()):
                marks[place] = max(1, marks[place])
            elif len(own):
                sums[place] += moments_of(own).mean
                counts[place] += 1
    marks[(marks == 1) & (counts > 0)] = 0
    values = numpy.ma.masked_array(sums / numpy.maximum(counts, 1), (counts == 0) | (marks == 2))
    if len(grid.rows) == 1:
        return [Panel("", experts, values[:, 0], marks[:, 0])]
    panels = [Panel(expert, grid.rows, values[at], marks[at]) for at, expert in enumerate(experts)]
    mean = Panel(f"mean of {len(experts)} experts", grid.rows, values.mean(axis=0), marks.min(axis=0))
    return panels + [mean] * (len(experts) > 1)


def with_means(values: Any) -> Any:
    """Adds a column with the mean of each row, and a row with that of each column, where there are several to average."""
    rows, columns = values.shape
    full = numpy.ma.masked_all((rows + (rows > 1), columns + (columns > 1)))
    full[:rows, :columns] = values
    if columns > 1:
        full[:rows, columns] = values.mean(axis=1)
    if rows > 1:
        full[rows, :columns] = values.mean(axis=0)
    if rows > 1 and columns > 1:
        full[rows, columns] = values.mean()
    return full
