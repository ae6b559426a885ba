"""Products of factors, ``left diag(scale) right``, with the same bits for any number of a CPU's threads, and their slopes."""

from __future__ import annotations

import torch
from torch import Tensor

from adamerge.deltas.tuning import STORED_PIECE, TERMS


def product(left: Tensor, right: Tensor, scale: Tensor | None = None) -> Tensor:
    """Returns ``left diag(scale) right``, ``(rows, columns)``.

    What is exported must be what was learned, also on a machine with other threads. A CPU's library shares out a product by
    rows and columns, which is in no bit, but a long sum by its terms, and that of a vector in yet another way. So no more
    than ``TERMS`` are added up in one call, and where the product is a vector they are added one after the other.

    Args:
        left: ``(rows, n)``.
        right: ``(n, columns)``.
        scale: ``(n,)``; ones when None.
    """
    (rows, count), columns = left.shape, right.shape[1]
    if left.device.type != "cpu":
        return torch.mm(left if scale is None else left * scale, right)
    out = left.new_zeros(rows, columns)
    for at in range(0, count, TERMS):
        few = slice(at, at + TERMS)
        own = left[:, few] if scale is None else left[:, few] * scale[few]
        if min(rows, columns) == 1:
            for one, other in zip(own.t(), right[few], strict=True):
                out.addcmul_(one.unsqueeze(1), other)
        elif at == 0:
            torch.mm(own, right[few], out=out)
        else:
            out.addmm_(own, right[few])
    return out


def slopes(left: Tensor, gradient: Tensor, right: Tensor) -> Tensor:
    """Returns ``left[:, j]^T G right[j]`` of each component, ``(n,)``, for the gradient ``G`` of their product.

    Args:
        left: ``(rows, n)``.
        gradient: ``(rows, columns)``.
        right: ``(n, columns)``.
    """
    few = max(TERMS, STORED_PIECE // max(right.shape[1], 1))  # else it would take the memory of all factors again
    parts = [
        (left[:, at : at + few].t() @ gradient).mul_(right[at : at + few]).sum(dim=1)
        for at in range(0, len(right), few)
    ]
    return parts[0] if len(parts) == 1 else torch.cat([right.new_empty(0), *parts])
