"""Block by block: the weights of a block of the network exist only while it runs, and its gradient only while it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from adamerge.backbones.structure import outermost, owner, users
from adamerge.errors import ConfigError
from adamerge.merging.block_execution import StandIn
from adamerge.merging.copies import Copy, Passing, Place, Visit
from adamerge.merging.footprint import Held, Unit
from adamerge.task_vectors.storage import FP32


class BlockCopy(Copy):
    """One block at a time, for models of which a copy and its gradient do not fit.

    A block is merged when it runs, and its weights are dropped after it. The backward pass merges it again, runs it
    again, as gradient checkpointing does, and contracts its gradient at once. So each micro-batch costs two merges, one
    contraction and one more forward pass; of activations, the inputs of the blocks remain. Embeddings, final norms and
    heads, whatever is in no block, are always there.
    """

    each_pass = True

    def passing(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> list[Passing]:
        """The members of the outermost module lists, with the parameters that are theirs alone."""
        modules, used = outermost(network), users(network)
        parts: list[dict[str, Tensor]] = [{} for _ in modules]
        for name, tensor in tensors.items():
            found = used.get(id(owner(tensor)), set())
            if len(found) == 1 and min(found) >= 0:
                parts[min(found)][name] = tensor
        blocks: list[Passing] = [Block(module, own) for module, own in zip(modules, parts, strict=True) if own]
        if not blocks:
            raise ConfigError(
                f"{type(network).__name__} has no blocks to merge one at a time",
                expected="a list of modules, such as the layers of a transformer",
                todo="leave model.copy at adamerge.WholeCopy",
            )
        return blocks

    def held(self, units: Sequence[Unit], processes: int) -> Held:
        """What is in no block, in every process; and the largest block with its gradient."""
        always = [unit for unit in units if not unit.block]
        blocks = [unit.nbytes + FP32 * unit.merged for unit in units if unit.block]
        weights = sum(unit.nbytes for unit in always)
        return Held(weights, FP32 * sum(unit.merged for unit in always), max(blocks, default=0), made=weights)


class Block(StandIn):
    """A module that fetches its weights, runs, and drops them; its gradients are handed on before they are dropped.

    Args:
        module: whose ``forward`` is replaced.
        tensors: on-disk name to each parameter of it, or view of one, that is dropped.

    Attributes:
        fetch: fills the tensors; with grad enabled, ready for ``hand_on``.
        hand_on: takes the gradients that were just accumulated.
        anchor: requires grad when the weights do, so that autograd comes by though no input may ask for it.
        names: of the tensors.
    """

    fetch: Visit
    hand_on: Visit

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self.names = tuple(tensors)
        self.anchor = torch.zeros((), requires_grad=True)
        self.parameters = list({id(owner(tensor)): owner(tensor) for tensor in tensors.values()}.values())
        # where each tensor lies in its parameter: the parameters get other storages at each run
        self._places = {
            name: (owner(t), t.size(), t.stride(), t.storage_offset() - owner(t).storage_offset(), t is owner(t))
            for name, t in tensors.items()
        }
        self._strides = [parameter.stride() for parameter in self.parameters]
        self._taken: dict[str, Place] = {}
        super().__init__(module)
        self.drop()

    def take(self) -> None:
        """Make room for the weights, and fetch them."""
        self._make_room()
        with torch.no_grad():
            self._taken = {
                name: Place(parameter if whole else parameter.as_strided(size, stride, offset))
                for name, (parameter, size, stride, offset, whole) in self._places.items()
            }
        self.fetch(self._taken)

    def give(self) -> None:
        """Hand the gradients on."""
        self.hand_on(self._taken)

    def drop(self) -> None:
        """Let weights and gradients go; whoever looks at a parameter sees zeros of its shape, which take no room."""
        self._taken = {}
        for parameter in self.parameters:
            parameter.grad = None
            parameter.data = parameter.new_zeros(()).expand(parameter.shape)

    def undo(self) -> None:
        """Give the module its own ``forward`` back, and room for its weights where it costs nothing until it is filled."""
        super().undo()
        self.to(torch.device("cpu"))
        self._make_room()

    def to(self, device: torch.device) -> None:
        """Run on another device from now on."""
        for parameter in self.parameters:
            parameter.data = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)

    def _make_room(self) -> None:
        for parameter, stride in zip(self.parameters, self._strides, strict=True):
            parameter.data = torch.empty_strided(
                parameter.size(), stride, dtype=parameter.dtype, device=parameter.device
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own ``forward``."""
        leaves, structure = tree_flatten((args, kwargs))
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        call = _Call(self, leaves, places, structure)
        tensors = [leaves[place] for place in places]
        for place in places:
            leaves[place] = None  # autograd keeps what it needs of them
        found = _Run.apply(call, self.anchor, *tensors)
        return call.rebuilt(found)


class _Call:
    """One call of a block: what it was given beside tensors, how to put it together, and what came out."""

    def __init__(self, block: Block, leaves: list[Any], places: list[int], structure: TreeSpec) -> None:
        self.block, self.leaves, self.places, self.structure = block, leaves, places, structure
        self.out: list[Any] = []
        self.out_places: list[int] = []
        self.out_structure: TreeSpec | None = None

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Call the module; its tensors among the results."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self.structure)
        self.out, self.out_structure = tree_flatten(self.block.forward(*args, **kwargs))
        self.out_places = [place for place, leaf in enumerate(self.out) if isinstance(leaf, Tensor)]
        found = [self.out[place] for place in self.out_places]
        for place in self.out_places:
            self.out[place] = None
        return found

    def rebuilt(self, tensors: Sequence[Tensor]) -> Any:
        """What the module returned."""
        leaves = list(self.out)
        for place, tensor in zip(self.out_places, tensors, strict=True):
            leaves[place] = tensor
        assert self.out_structure is not None
        return tree_unflatten(leaves, self.out_structure)


class _Run(torch.autograd.Function):
    """A block's forward pass without a graph, and the graph in the backward pass."""

    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*tensors)
        device = call.block.parameters[0].device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        try:
            call.block.take()
            found = call.run(tensors)
        finally:
            call.block.drop()
        given = {id(tensor) for tensor in tensors}
        # a function must not return its own input; what a block hands through is a view of it
        return tuple(tensor.view_as(tensor) if id(tensor) in given else tensor for tensor in found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        wanted = ctx.needs_input_grad[2:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, wanted, strict=True)]
        device, dtype, enabled = ctx.autocast
        with torch.enable_grad():
            try:
                call.block.take()
                with torch.autocast(device, dtype, enabled):
                    found = call.run(inputs)
                pairs = [
                    (tensor, gradient)
                    for tensor, gradient in zip(found, gradients, strict=True)
                    if gradient is not None and tensor.requires_grad
                ]
                torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
                del found, pairs
                call.block.give()
            finally:
                call.block.drop()
        return None, None, *[tensor.grad if need else None for tensor, need in zip(inputs, wanted, strict=True)]
