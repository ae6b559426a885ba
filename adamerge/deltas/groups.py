"""Groups: which elements of one tensor share a coefficient, ``g`` of theta0[e] + sum_k w[k, g(e)] tau_k[e]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from adamerge.deltas.kernels import IndexedSums, OneSum, RunSums, SharedSums


class Groups(ABC):
    """How the elements of one tensor share the coefficients that each expert has for it."""

    count: int
    """Coefficients of one expert for this tensor."""

    @abstractmethod
    def within(self, part: slice, numel: int, device: torch.device) -> SharedSums:
        """Returns the sums of one part of the flattened tensor of ``numel`` elements, computed on ``device``."""

    def index_bytes(self, numel: int) -> int:
        """Returns the bytes that stay in memory from the first contraction of a tensor of ``numel`` elements on."""
        return 0

    @property
    def transient_per_element(self) -> int:
        """Returns the temporary bytes per element while tensors are summed."""
        return 0


class Whole(Groups):
    """All elements of the tensor share one coefficient."""

    count = 1

    def within(self, part: slice, numel: int, device: torch.device) -> SharedSums:
        """Returns sums of one coefficient, whatever the part."""
        return OneSum()


class Chunks(Groups):
    """Contiguous runs of the flattened tensor, sizes differing by one at most, so that none is ever empty.

    Args:
        count: chunks of a tensor; at most its number of elements.

    Reference: Expert Merging (Zhang et al., 2025), https://arxiv.org/abs/2509.25712, section on layer-chunked coefficients.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def within(self, part: slice, numel: int, device: torch.device) -> SharedSums:
        """Returns sums of the chunks that lie in the part, the first and the last of them cut to it."""
        if part.start == part.stop:
            return RunSums(self.count, 0, [])
        first = ((part.start + 1) * self.count - 1) // numel  # the last whose edge is not after the start
        last = (part.stop * self.count - 1) // numel + 1
        edges = [i * numel // self.count for i in range(first, last + 1)]
        slices = [slice(max(a, part.start) - part.start, min(b, part.stop) - part.start) for a, b in pairwise(edges)]
        return RunSums(self.count, first, slices)


class Ids(Groups):
    """Any elements: an integer for each says which coefficient it uses.

    Args:
        count: coefficients of an expert.
        make: gives the ids, ``(numel,)``, each in [0, count), in the smallest dtype that holds them; called when they are
            needed, and what it gives stays in memory from the first contraction on.
    """

    def __init__(self, count: int, make: Callable[[], Tensor]) -> None:
        self.count, self.make = count, make
        self.ids: Tensor | None = None

    @staticmethod
    def dtype(count: int) -> torch.dtype:
        """Returns the smallest integer dtype that holds the ids of so many coefficients."""
        return torch.uint8 if count <= 1 << 8 else torch.int16 if count <= 1 << 15 else torch.int32

    def index_bytes(self, numel: int) -> int:
        """Returns the bytes of the ids of so many elements."""
        return numel * self.dtype(self.count).itemsize

    @property
    def transient_per_element(self) -> int:
        """Bytes of an id, of the same as an index, and of a coefficient in fp32."""
        return self.dtype(self.count).itemsize + torch.int64.itemsize + torch.float32.itemsize

    def within(self, part: slice, numel: int, device: torch.device) -> SharedSums:
        """Returns sums of the part's ids; a contraction keeps the ids of the whole tensor for those that follow."""
        ids = (self.make() if self.ids is None else self.ids).to(device)
        return IndexedSums(self.count, ids[part].long(), partial(self._remember, ids))

    def _remember(self, ids: Tensor) -> None:
        self.ids = ids
