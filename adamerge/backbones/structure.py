"""The structure of a network: its blocks, which module uses which parameter, and whose memory a view is in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn


def owner(tensor: Tensor) -> Tensor:
    """Returns the parameter or buffer that holds the values of ``tensor``, which is itself or a view of it."""
    return tensor if tensor._base is None else tensor._base


def key_of(tensor: Tensor) -> tuple[object, ...]:
    """Returns what two tensors share that are the same numbers in memory, such as a parameter and a view of all of it."""
    # the address of the data would be 0 of weights that do not exist now
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


def users(network: nn.Module) -> dict[int, set[int]]:
    """Returns which blocks use each parameter, by its id; of a module in no block ``~`` its index among all modules."""
    inside = _inside(outermost(network))
    used_by: dict[int, set[int]] = {}
    for place, module in enumerate(network.modules()):
        for parameter in module.parameters(recurse=False):
            used_by.setdefault(id(parameter), set()).add(inside.get(id(module), ~place))
    return used_by


def whole_modules(network: nn.Module) -> list[nn.Module]:
    """Returns what can be gathered at once: each block, and each other module with parameters and no modules in it."""
    blocks = outermost(network)
    inside = _inside(blocks)
    others = (module for module in network.modules() if id(module) not in inside and not list(module.children()))
    return blocks + [module for module in others if list(module.parameters(recurse=False))]


def _inside(blocks: Sequence[nn.Module]) -> dict[int, int]:
    """Returns the index of the block that holds a module, by the module's id."""
    return {id(part): place for place, block in enumerate(blocks) for part in block.modules()}


def outermost(network: nn.Module) -> list[nn.Module]:
    """Returns the blocks, in the network's order: members of module lists that are in no block of another list."""
    blocks: list[nn.Module] = []

    def walk(module: nn.Module, listed: bool) -> None:
        for child in module.children():
            holds = isinstance(child, nn.ModuleList | nn.ModuleDict)
            if listed and not holds:  # what only holds others is never called itself
                blocks.append(child)
            else:
                walk(child, isinstance(child, nn.ModuleList) or (listed and holds))

    walk(network, listed=False)
    return blocks


def names_in_order(network: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Sorts on-disk names as the network registers what they fill; pieces of one parameter as they lie in it."""
    ranks = {id(own): rank for rank, own in enumerate((*network.parameters(), *network.buffers()))}
    places = {
        name: (ranks.get(id(owner(tensor)), len(ranks)), tensor.storage_offset()) for name, tensor in tensors.items()
    }
    return sorted(places, key=places.__getitem__)


def prevailing_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Returns the dtype that most elements of the tensors have."""
    elements = Counter[torch.dtype]()
    for tensor in tensors:
        elements[tensor.dtype] += tensor.numel()
    return elements.most_common(1)[0][0]
