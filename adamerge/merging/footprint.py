"""The memory footprint of a merged copy, from the units of its network: told from names on disk, or from the network."""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from adamerge.backbones.structure import owner, users, whole_modules
from adamerge.checkpoints.name_patterns import numbered_prefix
from adamerge.task_vectors.task_vectors import TaskVectors


@dataclass(frozen=True)
class Unit:
    """Weights of a network that run together: those of a block, or of a module that is in none.

    Attributes:
        nbytes: in the dtype of the copy.
        numel: elements, of floating-point tensors.
        merged: of these, elements that are merged and get a gradient.
        block: whether it is a block.
        shared: whether others use it too, or it is no module's alone, as buffers are.
    """

    nbytes: int
    numel: int
    merged: int
    block: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Footprint:
    """Bytes that a merged copy takes in one process.

    Attributes:
        weights: from a merge to its contraction.
        gradient: of these, fp32.
        running: for a moment beside them: the unit that runs, with its gradient.
        made: of the weights, what is there before the first merge.
        afterwards: whether gradients are contracted when nothing runs any more.
    """

    weights: int
    gradient: int
    running: int = 0
    made: int = 0
    afterwards: bool = False

    def peak(self, contracting: int = 0) -> int:
        """Returns the most bytes at once, with what a contraction takes for a moment."""
        moment = max(self.running, contracting) if self.afterwards else self.running + contracting
        return self.weights + self.gradient + moment


def units_by_name(vectors: TaskVectors, dtype: torch.dtype) -> list[Unit]:
    """Returns units as headers tell them: the name up to its first integer is a block, else that up to its last dot a module.

    A tie is not seen there, and a list of layers without names looks like blocks: the network itself knows better.

    Args:
        vectors: base and experts; nothing of them is read.
        dtype: of the merged copy.
    """
    base = vectors.base
    tensors: list[tuple[Hashable, Unit]] = []
    for name in base:
        numel, own = base.shape(name).numel(), base.dtype(name)
        block = numbered_prefix(name)
        if not own.is_floating_point:
            tensors.append(("", Unit(numel * own.itemsize, 0, 0, shared=True)))
            continue
        merged = numel if name in vectors else 0
        if block is None or block == name:  # a member of a list of parameters is no module
            tensors.append((name.rpartition(".")[0], Unit(numel * dtype.itemsize, numel, merged)))
        else:
            tensors.append((block, Unit(numel * dtype.itemsize, numel, merged, block=True)))
    return _summed(tensors)


def units_of(network: nn.Module, tensors: Mapping[str, Tensor], merged: Container[str]) -> list[Unit]:
    """Returns the units of a network that is there.

    Args:
        network: whose modules run.
        tensors: on-disk name to a parameter or buffer, or a view of one.
        merged: names of those that are merged.
    """
    modules, used, whole = list(network.modules()), users(network), set(map(id, whole_modules(network)))
    units: list[tuple[Hashable, Unit]] = []
    for name, tensor in tensors.items():
        at = used.get(id(owner(tensor)), set())
        unit = Unit(tensor.nbytes, tensor.numel() if tensor.is_floating_point() else 0, 0)
        unit = replace(unit, merged=unit.numel if name in merged else 0)
        user = next(iter(at), -1)
        # what a module has beside other modules is no unit's alone
        if len(at) == 1 and (user >= 0 or id(modules[~user]) in whole):
            units.append((user, replace(unit, block=user >= 0)))
        else:
            units.append((id(owner(tensor)), replace(unit, shared=True)))
    return _summed(units)


def _summed(tensors: Iterable[tuple[Hashable, Unit]]) -> list[Unit]:
    """Returns one unit for all tensors that have the same key and are shared alike."""
    units: dict[tuple[Hashable, bool], Unit] = {}
    for key, own in tensors:
        known = units.get((key, own.shared))
        if known is not None:
            own = replace(
                known, nbytes=known.nbytes + own.nbytes, numel=known.numel + own.numel, merged=known.merged + own.merged
            )
        units[key, own.shared] = own
    return list(units.values())
