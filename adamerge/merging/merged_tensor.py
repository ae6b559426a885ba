"""Merging: one tensor of the base and its update become one merged tensor, in training, evaluation and export alike."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from adamerge.deltas.base import Deltas
from adamerge.deltas.lazy_combination import Outline
from adamerge.merging.pullback import WayBack
from adamerge.parametrizations import Parametrization, Update


def merged_tensor(base: Tensor, update: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``(base.float() + update).to(dtype)``: the one place where a merged tensor is made.

    Args:
        base: as stored; a narrower dtype is widened inside the addition.
        update: of the same shape, fp32.
        dtype: of the result.
        out: of that dtype and shape, to write into.
    """
    return torch.add(base, update, out=torch.empty_like(update, dtype=dtype) if out is None else out)


def updates(
    parametrization: Parametrization,
    name: str,
    deltas: Deltas,
    update_of: Update | None = None,
    part: slice | None = None,
    size: int | None = None,
    way_back: WayBack | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """The update of a tensor in consecutive parts, each with its flat values, which are computed when they are asked for.

    Args:
        parametrization: decides whether parts have updates of their own.
        name: of the tensor.
        deltas: of all of it.
        update_of: the parametrization's draw; what is saved, when None.
        part: of the tensor, all that is wanted; all of it when None.
        size: elements of a part; what a merge takes at a time, when None.
        way_back: remembers how the update depends on the coefficients, if given.
    """
    update_of = parametrization.forward if update_of is None else update_of
    if not parametrization.local:
        return _at_once(name, deltas, update_of, part, way_back)
    outline = Outline(deltas if part is None else deltas.within(part))
    # its values are nowhere needed at once, only its way back to the coefficients
    update = update_of(name, outline)
    combination = outline.combination(update)
    if way_back is not None:
        way_back.keep(name, update if combination is None else combination)
    return _in_parts(name, outline.of, update_of, size) if combination is None else combination.values(size)


def _at_once(
    name: str, deltas: Deltas, update_of: Update, part: slice | None, way_back: WayBack | None
) -> Iterator[tuple[slice, Tensor]]:
    """One that cannot be computed in parts: once, for its values and its way back."""
    with torch.set_grad_enabled(way_back is not None):
        update = update_of(name, deltas).reshape(-1)
        update = update if part is None else update[part]
    if way_back is not None:
        way_back.keep(name, update)
    yield slice(0, update.numel()), update.detach()


def _in_parts(name: str, deltas: Deltas, update_of: Update, size: int | None) -> Iterator[tuple[slice, Tensor]]:
    """One that is linear in deltas by a formula of its own."""
    for part, opened in deltas.in_pieces(size=size):
        with torch.no_grad():
            update = update_of(name, opened if part == deltas.whole else opened.within(part)).reshape(-1)
        yield part, update
