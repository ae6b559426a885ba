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
from adamerge.merging.copies import Copy, Place, TransientBlock, Visit
from adamerge.merging.footprint import Footprint, Unit
from adamerge.task_vectors.memory import FP32


class BlockCopy(Copy):
    """One block at a time, for models of which a copy and its gradient do not fit.

    A block is merged when it runs, and its weights are dropped after it. The backward pass merges it again, runs it
    again, as gradient checkpointing does, and contracts its gradient at once. So each micro-batch costs two merges, one
    contraction and one more forward pass; of activations, the inputs of the blocks remain. Embeddings, final norms and
    heads, whatever is in no block, are always there.
    """

    each_pass = True

    def transient(
        self, network: nn.Module, tensors: Mapping[str, Tensor], fetch: Visit, hand_on: Visit
    ) -> Sequence[TransientBlock]:
        """Returns the members of the outermost module lists, with the parameters that are theirs alone."""
        modules, used = outermost(network), users(network)
        parameters: list[dict[str, Tensor]] = [{} for _ in modules]
        for name, tensor in tensors.items():
            at = used.get(id(owner(tensor)), set())
            if len(at) == 1 and min(at) >= 0:
                parameters[min(at)][name] = tensor
        blocks = [Block(module, own, fetch, hand_on) for module, own in zip(modules, parameters, strict=True) if own]
        if not blocks:
            raise ConfigError(
                f"{type(network).__name__} has no blocks to merge one at a time",
                expected="a list of modules, such as the layers of a transformer",
                todo="leave model.copy at adamerge.WholeCopy",
            )
        return blocks

    def footprint(self, units: Sequence[Unit], processes: int) -> Footprint:
        """Returns the memory of what is in no block, in every process, and of the largest block with its gradient."""
        always = [unit for unit in units if not unit.block]
        blocks = [unit.nbytes + FP32 * unit.merged for unit in units if unit.block]
        weights = sum(unit.nbytes for unit in always)
        return Footprint(weights, FP32 * sum(unit.merged for unit in always), max(blocks, default=0), made=weights)


class Block(StandIn):
    """A module that fetches its weights, runs, and drops them; its gradients are handed on before they are dropped.

    Args:
        module: whose ``forward`` is replaced.
        tensors: on-disk name to each parameter of it, or view of one, that is dropped.
        fetch: fills the tensors; with grad enabled, ready for ``hand_on``.
        hand_on: takes the gradients that were just accumulated.

    Attributes:
        anchor: requires grad when the weights do, so that autograd comes by though no input may ask for it.
        names: of the tensors.
    """

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor], fetch: Visit, hand_on: Visit) -> None:
        self.names, self.fetch, self.hand_on = tuple(tensors), fetch, hand_on
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
        """Makes room for the weights, and fetches them."""
        self._make_room()
        with torch.no_grad():
            self._taken = {
                name: Place(parameter if whole else parameter.as_strided(size, stride, offset))
                for name, (parameter, size, stride, offset, whole) in self._places.items()
            }
        self.fetch(self._taken)

    def give(self) -> None:
        """Hands the gradients of the block's weights on."""
        self.hand_on(self._taken)

    def drop(self) -> None:
        """Lets weights and gradients go; whoever looks at a parameter sees zeros of its shape, which take no room."""
        self._taken = {}
        for parameter in self.parameters:
            parameter.grad = None
            parameter.data = parameter.new_zeros(()).expand(parameter.shape)

    def undo(self) -> None:
        """Gives the module its own ``forward`` back, and room for its weights where it costs nothing until it is filled."""
        super().undo()
        self.to(torch.device("cpu"))
        self._make_room()

    def to(self, device: torch.device) -> None:
        """Has the block run on another device from now on."""
        for parameter in self.parameters:
            parameter.data = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)

    def _make_room(self) -> None:
        for parameter, stride in zip(self.parameters, self._strides, strict=True):
            parameter.data = torch.empty_strided(
                parameter.size(), stride, dtype=parameter.dtype, device=parameter.device
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module's own ``forward`` with the weights fetched for it."""
        leaves, structure = tree_flatten((args, kwargs))
        numbers = [number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        call = _Call(self, leaves, numbers, structure)
        tensors = [leaves[number] for number in numbers]
        for number in numbers:
            leaves[number] = None  # autograd keeps what it needs of them
        return call.rebuilt(_Run.apply(call, self.anchor, *tensors))


class _Call:
    """One call of a block: what it was given beside tensors, how to put it together, and what came out."""

    def __init__(self, block: Block, leaves: list[Any], numbers: list[int], structure: TreeSpec) -> None:
        self.block, self.leaves, self.numbers, self.structure = block, leaves, numbers, structure
        self.out: list[Any] = []
        self.out_numbers: list[int] = []
        self.out_structure: TreeSpec | None = None

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Calls the module, and returns the tensors among its results."""
        leaves = list(self.leaves)
        for number, tensor in zip(self.numbers, tensors, strict=True):
            leaves[number] = tensor
        args, kwargs = tree_unflatten(leaves, self.structure)
        self.out, self.out_structure = tree_flatten(self.block.forward(*args, **kwargs))
        self.out_numbers = [number for number, leaf in enumerate(self.out) if isinstance(leaf, Tensor)]
        results = [self.out[number] for number in self.out_numbers]
        for number in self.out_numbers:
            self.out[number] = None
        return results

    def rebuilt(self, tensors: Sequence[Tensor]) -> Any:
        """Returns what the module returned, with these tensors in it."""
        leaves = list(self.out)
        for number, tensor in zip(self.out_numbers, tensors, strict=True):
            leaves[number] = tensor
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
            results = call.run(tensors)
        finally:
            call.block.drop()
        given = {id(tensor) for tensor in tensors}
        # a function must not return its own input; what a block hands through is a view of it
        return tuple(tensor.view_as(tensor) if id(tensor) in given else tensor for tensor in results)

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
                    results = call.run(inputs)
                pairs = [
                    (tensor, gradient)
                    for tensor, gradient in zip(results, gradients, strict=True)
                    if gradient is not None and tensor.requires_grad
                ]
                torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])
                del results, pairs
                call.block.give()
            finally:
                call.block.drop()
        return None, None, *[tensor.grad if need else None for tensor, need in zip(inputs, wanted, strict=True)]
