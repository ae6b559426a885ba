"""Merged tensors: base and update become one, in training, evaluation and export alike; what a network's copy holds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from adamerge.deltas.base import Deltas
from adamerge.deltas.groups import Groups
from adamerge.merging.copies import Place
from adamerge.merging.pullback import MergeGradients
from adamerge.parametrizations import Parametrization, Update
from adamerge.precision import exact
from adamerge.task_vectors.task_vectors import TaskVectors


def merged_tensor(base: Tensor, update: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Returns ``(base.float() + update).to(dtype)``: the one place where a merged tensor is made.

    Args:
        base: as stored; a narrower dtype is widened inside the addition.
        update: of the same shape, fp32.
        dtype: of the result.
        out: of that dtype and shape, to write into.
    """
    return torch.add(base, update, out=torch.empty_like(update, dtype=dtype) if out is None else out)


def linear_update(parametrization: Parametrization, name: str, update_of: Update) -> tuple[Tensor, Groups] | None:
    """Returns coefficients and groups where an update is ``sum_k c_k tau_k`` and nothing else; None where it is not.

    Args:
        parametrization: of the merge.
        name: of the tensor.
        update_of: the parametrization's draw: one that is not its own ``forward`` has a formula of its own.
    """
    return parametrization.linear(name) if update_of == parametrization.forward else None


def updates(
    parametrization: Parametrization,
    name: str,
    deltas: Deltas,
    *,
    update_of: Update | None = None,
    part: slice | None = None,
    size: int | None = None,
    gradients: MergeGradients | None = None,
    start: Deltas | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Returns an iterator over the update of a tensor: a piece of it and its flat values, computed when they are asked for.

    The one place where a start is added: piece by piece, after the sum.

    Args:
        parametrization: holds the coefficients.
        name: of the tensor.
        deltas: of all of it.
        update_of: the parametrization's draw; what is saved, when None.
        part: of the tensor, all that is wanted; all of it when None.
        size: elements of a piece; what a merge takes at a time, when None.
        gradients: notes how the update depends on the coefficients, if given.
        start: what is added with coefficient 1, as the deltas of one expert; nothing when None.
    """
    update_of = parametrization.forward if update_of is None else update_of
    linear = linear_update(parametrization, name, update_of)
    if linear is None:
        values = _at_once(name, deltas, update_of, part, gradients)
    else:
        coefficients, groups = linear
        if gradients is not None:
            gradients.note(name, coefficients, partial(deltas.contract, groups=groups, part=part))
        values = deltas.sums(coefficients.detach(), groups, part, size)
    return values if start is None else _started(values, start, 0 if part is None else part.start)


def _started(values: Iterator[tuple[slice, Tensor]], start: Deltas, first: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields an update and the start's deltas together; what a mask's update is made of stays as it is."""
    opened = start.opened()
    for piece, update in values:
        for row in opened.row_batches(update.dtype, slice(first + piece.start, first + piece.stop)):
            with exact(update.device):
                update = update + row[0]
        yield piece, update


def _at_once(
    name: str, deltas: Deltas, update_of: Update, part: slice | None, gradients: MergeGradients | None
) -> Iterator[tuple[slice, Tensor]]:
    """Yields an update that cannot be computed in pieces, and notes how it depends on the coefficients."""
    with torch.set_grad_enabled(gradients is not None):
        update = update_of(name, deltas).reshape(-1)
        update = update if part is None else update[part]
    if gradients is not None:
        gradients.note(name, update, partial(torch.reshape, shape=update.shape))
    yield slice(0, update.numel()), update.detach()


class Contents(ABC):
    """What the copy of a network holds now.

    Attributes:
        foreign: names of buffers that hold other values than a merged model's.
        gradients: of a merge, until they are contracted.
    """

    foreign: frozenset[str] = frozenset()
    gradients: MergeGradients | None = None

    @abstractmethod
    def fill(self, places: Mapping[str, Place]) -> None:
        """Fills tensors of the copy: on-disk name to where the tensor, or a part of it, is."""

    def hand_on(self, places: Mapping[str, Place]) -> None:
        """Contracts the gradients of tensors that are about to go."""
        if self.gradients is not None:
            self.gradients.hand_on(places)


class OneModel(Contents):
    """The tensors of one model, such as the base or an expert.

    Args:
        source: gives a whole tensor by its on-disk name.
        foreign: names of buffers that hold other values than a merged model's.
    """

    def __init__(self, source: Callable[[str], Tensor], foreign: Iterable[str] = ()) -> None:
        self.source, self.foreign = source, frozenset(foreign)

    def fill(self, places: Mapping[str, Place]) -> None:
        """Copies tensors of the one model into the copy."""
        for name, place in places.items():
            place.fill(self.source(name))


class Merge(Contents):
    """Base and update of one merge: the tensors that are merged; others are the base's.

    Args:
        vectors: base and experts.
        parametrization: holds the coefficients.
        update_of: the parametrization's draw; what is saved, when None.
        gradients: notes how each merged tensor depends on the coefficients; nothing can be pulled back when None.
    """

    def __init__(
        self,
        vectors: TaskVectors,
        parametrization: Parametrization,
        update_of: Update | None = None,
        gradients: MergeGradients | None = None,
    ) -> None:
        self.vectors, self.parametrization, self.update_of = vectors, parametrization, update_of
        self.gradients = gradients

    def fill(self, places: Mapping[str, Place]) -> None:
        """Merges tensor by tensor; of a block, only what the backward pass merges, with grad enabled, is pulled back."""
        gradients = self.gradients if torch.is_grad_enabled() else None
        # small ones first: what a processor needs to merge them is in its caches until a large one passes through
        ordered = sorted(places.items(), key=lambda one: one[1].tensor.numel())
        # two phases: what needs no values of deltas, such as constraints, is computed for all tensors before any is read
        pieces = {
            name: updates(
                self.parametrization,
                name,
                self.vectors[name],
                update_of=self.update_of,
                part=place.part,
                gradients=gradients,
                start=self.vectors.start_deltas(name),
            )
            for name, place in ordered
            if name in self.vectors
        }
        for name, place in ordered:
            if name in pieces:
                _fill(place, self.vectors.base_tensor(name), pieces.pop(name))
                place.forget()
            else:
                place.fill(self.vectors.base[name])


def _fill(place: Place, base: Tensor, values: Iterator[tuple[slice, Tensor]]) -> None:
    """Fills a tensor of the copy, or the part of one that is there, with base and update."""
    target, base = place.tensor.detach(), place.cut(base).reshape(-1)
    out = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
    flat = out.view(-1)
    for piece, update in values:
        merged_tensor(base[piece], update, flat.dtype, out=flat[piece])
    if out is not target:
        target.copy_(out)
