"""Groups: which elements of one tensor share a coefficient, ``g`` of theta0[e] + sum_k w[k, g(e)] tau_k[e]."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from adamerge.deltas.element_sums import ElementSums, RowColumnSums
from adamerge.deltas.kernels import IndexedSums, OneSum, SharedSums
from adamerge.deltas.run_sums import Runs, RunSums
from adamerge.deltas.tuning import LONGEST_INDEXED
from adamerge.errors import ConfigError


class Groups(ABC):
    """How the elements of one tensor share the coefficients that each expert has for it."""

    count: int
    """Coefficients of one expert for this tensor."""

    apart: bool = False
    """Whether no two elements share a coefficient."""

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
            return RunSums([])
        first = ((part.start + 1) * self.count - 1) // numel  # the last whose edge is not after the start
        last = (part.stop * self.count - 1) // numel + 1
        if numel % self.count == 0:
            return RunSums(_even(part, numel // self.count, first, last))
        if numel // self.count >= LONGEST_INDEXED:
            edges = [min(max(i * numel // self.count, part.start), part.stop) for i in range(first, last + 1)]
            runs = zip(range(first, last), edges, edges[1:], strict=False)
            return RunSums([Runs(slice(a - part.start, b - part.start), own, 1) for own, a, b in runs])
        edges_of = torch.arange(first, last + 1, device=device).mul_(numel).div_(self.count, rounding_mode="floor")
        sizes = edges_of.clamp_(part.start, part.stop).diff()
        indices = torch.repeat_interleave(sizes, output_size=part.stop - part.start)
        return IndexedSums(slice(first, last), indices)


def _even(part: slice, size: int, first: int, last: int) -> list[Runs]:
    """Returns the runs of one size that a part consists of: one that it begins within, whole ones, and one that it cuts."""
    begin, end = -(-part.start // size), part.stop // size  # of the whole runs
    if begin > end:
        bounds = [(part.start, part.stop, first, 1)]
    else:
        edges = begin * size, end * size
        bounds = [(part.start, edges[0], first, 1), (*edges, begin, end - begin), (edges[1], part.stop, last - 1, 1)]
    return [Runs(slice(a - part.start, b - part.start), own, count) for a, b, own, count in bounds if a < b]


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
        return IndexedSums(slice(0, self.count), ids[part].long(), partial(self._remember, ids))

    def _remember(self, ids: Tensor) -> None:
        self.ids = ids


class Elements(Groups):
    """Each element of the tensor has a coefficient of its own: ``g(e) = e``.

    Args:
        count: elements of the tensor.
    """

    apart = True

    def __init__(self, count: int) -> None:
        self.count = count

    def within(self, part: slice, numel: int, device: torch.device) -> SharedSums:
        """Returns sums element by element."""
        return ElementSums(part)


class RowsAndColumns(Groups):
    """Element (i, j) of a matrix has the sum of two coefficients, number i and number ``rows + j``.

    Args:
        rows: of the matrix, the tensor's first dimension.
        columns: of the matrix, all other dimensions together.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns, self.count = rows, columns, rows + columns

    @property
    def transient_per_element(self) -> int:
        """Returns the bytes of a product, or of the sum of two coefficients, in fp32."""
        return torch.float32.itemsize

    def within(self, part: slice, numel: int, device: torch.device) -> SharedSums:
        """Returns sums by rows and columns."""
        return RowColumnSums(self.rows, self.columns, part, device)


class Components(Groups):
    """The components of each expert's delta have coefficients, and its elements none: it is a sum of products ``u v^T``.

    Args:
        count: components of the expert that has most.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def within(self, part: slice, numel: int, device: torch.device) -> SharedSums:
        """Raises ConfigError, since elements do not tell which component they are of: only factors are summed so."""
        raise ConfigError(
            "coefficients of components are for deltas that are factors, and these are elements",
            todo="name a file of adamerge.Components as model.task_vectors.components",
        )
