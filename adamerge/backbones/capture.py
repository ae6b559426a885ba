"""Captures: the inputs of named linear maps while a network runs, as matrices, without positions that are padding."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from adamerge.backbones.linears import LinearMap, Use, Watch


class Rows:
    """Which rows of inputs and outputs count, by linear map.

    Args:
        attended: gives for the name of a weight the masks, bool ``(samples, positions)``, that its inputs may have, the most
            likely first; none where all positions count. Masks on the host cost the device no wait.
    """

    def __init__(self, attended: Callable[[str], Sequence[Tensor]]) -> None:
        self.attended = attended
        self._numbers: dict[int, tuple[Tensor, Tensor]] = {}  # by the mask, which is held so that its id stays its own

    def of(self, name: str, values: Tensor, positions_first: bool) -> Tensor:
        """Returns ``(..., features)`` as ``(rows, features)`` in fp32, a copy; those of inputs of another shape all count.

        Args:
            name: of the weight.
            values: inputs or outputs.
            positions_first: whether the samples are their second dimension.
        """
        values = values.transpose(0, 1) if positions_first else values
        flat = values.reshape(-1, values.shape[-1])
        for mask in self.attended(name):
            if mask.shape == values.shape[:-1] or (values.ndim == 2 and len(flat) == mask.numel()):
                return flat.index_select(0, self._numbers_of(mask, flat.device)).to(torch.float32)
        return flat.to(torch.float32, copy=True)

    def _numbers_of(self, mask: Tensor, device: torch.device) -> Tensor:
        if id(mask) not in self._numbers:
            self._numbers[id(mask)] = mask, mask.flatten().nonzero().flatten().to(device, non_blocking=True)
        return self._numbers[id(mask)][1]


class Capture(Watch):
    """Keeps what enters named linear maps of a network that runs while it is active.

    ``inputs[name]`` is ``(samples x positions, in_features)`` in fp32 on the network's device, without positions that are
    padding, and differentiable where the network is; of a map that runs several times, all of them one after the other. A
    name that is of no linear map which ran, as that of a norm or a convolution, is in none.

    Args:
        tensors: on-disk name to the parameter that it fills, or a view of one.
        names: of weights.
        rows: which positions count.

    Attributes:
        inputs: by the name of the weight.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Collection[str], rows: Rows) -> None:
        super().__init__(tensors)
        self.names, self.rows = frozenset(names), rows
        self.inputs: dict[str, Tensor] = {}

    def used(self, use: Use) -> None:
        """Keeps the inputs of a map whose weight is named."""
        name = use.map.weight
        if name in self.names:
            entered = self.rows.of(name, use.inputs, use.positions_first)
            self.inputs[name] = torch.cat([self.inputs[name], entered]) if name in self.inputs else entered


class Entered(NamedTuple):
    """What there was at linear maps that share their inputs, while a network ran on a batch.

    Attributes:
        inputs: ``(rows, in_features)`` in fp32; a row is a position that counts.
        streams: of each map that writes into a residual stream what its output was added to, ``(rows, out_features)``.
    """

    inputs: Tensor
    streams: Mapping[str, Tensor]


class GroupCapture(Watch):
    """Keeps what there is at linear maps that share their inputs, and ends the network's pass as soon as it has it.

    What the network would have returned is lost: the block of the ``with`` ends where the pass does.

    Args:
        tensors: on-disk name to the parameter that it fills, or a view of one.
        group: the maps.
        rows: which positions count.
    """

    def __init__(self, tensors: Mapping[str, Tensor], group: Sequence[LinearMap], rows: Rows) -> None:
        super().__init__(tensors)
        self._waiting = {one.weight for one in group}
        self._streaming = {one.weight for one in group if one.streams}
        self._rows = rows
        self._uses: list[Use] = []
        self._inputs: Tensor | None = None
        self._streams: dict[str, Tensor] = {}

    @property
    def reached(self) -> bool:
        """Returns whether the first of the maps has run."""
        return self._inputs is not None

    @property
    def complete(self) -> bool:
        """Returns whether all of the maps have run."""
        return not self._waiting and not self._streaming

    @property
    def entered(self) -> Entered:
        """Returns what there was."""
        assert self._inputs is not None and self.complete, "the maps did not run"
        return Entered(self._inputs, self._streams)

    def used(self, use: Use) -> None:
        """Keeps the inputs that the maps share."""
        name = use.map.weight
        if name not in self._waiting:
            return
        self._waiting.remove(name)
        if self._inputs is None:
            self._inputs = self._rows.of(name, use.inputs, use.positions_first)
        if name in self._streaming:
            self._uses.append(use)
        self._end()

    def summed(self, one: Tensor, other: Tensor) -> None:
        """Keeps what the output of a map is added to."""
        for use in self._uses:
            before = use.added(one, other)
            before = use.added(other, one) if before is None else before
            if before is not None:
                name = use.map.weight
                self._streams[name] = self._rows.of(name, before, use.positions_first)
                self._streaming.discard(name)
        self._uses = [use for use in self._uses if use.map.weight in self._streaming]
        self._end()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Takes the pass's early end for what it is."""
        super().__exit__(kind, error, trace)
        return kind is _Enough

    def _end(self) -> None:
        if self.complete:
            raise _Enough


class _Enough(BaseException):
    """Ends a forward pass; nothing between here and the ``with`` block takes it for a fault."""
