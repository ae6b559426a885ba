"""Merging: one tensor of the base and its update become one merged tensor, in training, evaluation and export alike."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from adamerge.deltas import Deltas
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
    size: int | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """The update of a tensor in consecutive parts of it, each with its flat values; without autograd.

    Args:
        parametrization: decides whether parts have updates of their own.
        name: of the tensor.
        deltas: of it, or of a part where they have.
        update_of: the parametrization's draw; what is saved, when None.
        size: elements of a part; what a merge takes at a time, when None.
    """
    update_of = parametrization.forward if update_of is None else update_of
    for part, opened in deltas.in_pieces(size=size) if parametrization.local else [(deltas.whole, deltas)]:
        with torch.no_grad():
            update = update_of(name, opened if part == deltas.whole else opened.within(part)).reshape(-1)
        yield part, update
