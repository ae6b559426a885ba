"""On-disk names: which parameter of a transformers network, or view of one, each tensor of a checkpoint fills."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adamerge.backbones.structure import key_of
from adamerge.errors import CheckpointError


@dataclass(frozen=True)
class NameMap:
    """Maps the names of a checkpoint to what they are in the network.

    Attributes:
        tensors: on-disk name to the parameter or buffer it fills, or to a view of one; one name per storage.
        copies: name of a tied tensor's second copy to the name in ``tensors`` that it must equal.
        strangers: names that the network has no place for.
    """

    tensors: Mapping[str, Tensor]
    copies: Mapping[str, str]
    strangers: frozenset[str]

    def without(self, names: frozenset[str]) -> NameMap:
        """Returns a map in which these names are strangers."""
        tensors = {name: tensor for name, tensor in self.tensors.items() if name not in names}
        copies = {name: first for name, first in self.copies.items() if name not in names and first not in names}
        return NameMap(tensors, copies, self.strangers | names)


class _Uncopied(TorchFunctionMode):
    """Leaves views as they are: the library makes its pieces contiguous before it writes them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


def names_of(network: Any, names: Iterable[str]) -> NameMap:
    """Matches the names of a checkpoint to a network that transformers loaded from it.

    The library's own conversions, run backwards on the parameters themselves, give the names and the pieces of fused
    tensors; the prefix of the bare model may be there on disk or not.

    Args:
        network: a ``PreTrainedModel`` that ``from_pretrained`` gave.
        names: of the checkpoint it was loaded from.

    Raises:
        CheckpointError: a tensor on disk is no view of a parameter, as where rotary embeddings are permuted.
    """
    from transformers.core_model_loading import revert_weight_conversion

    with _Uncopied(), torch.no_grad():
        saved: dict[str, Tensor] = revert_weight_conversion(network, network.state_dict(keep_vars=True))
    owners = {id(owner) for owner in (*network.parameters(), *network.buffers())}
    targets = _tied_targets(network)
    tensors: dict[str, Tensor] = {}
    places: dict[tuple[Any, ...], str] = {}
    copies: dict[str, str] = {}
    strangers = set()
    prefix = f"{network.base_model_prefix}."
    # a tie keeps the name of its source, which every version of the library writes
    for name in sorted(names, key=lambda name: (name in targets, name)):
        key = next((n for n in (name, f"{prefix}{name}", name.removeprefix(prefix)) if n in saved), None)
        if key is None:
            strangers.add(name)
            continue
        tensor = saved[key]
        if id(tensor) not in owners and id(tensor._base) not in owners:
            raise CheckpointError(
                f"'{name}' is stored in another arrangement than {type(network).__name__} computes with",
                expected="each tensor on disk is a parameter, or a slice or transposition of one",
                got="a conversion that must copy",
                todo=f"convert the checkpoints, or write a Backbone for '{network.config.model_type}'",
            )
        place = key_of(tensor)
        if place in places:
            copies[name] = places[place]
        else:
            places[place] = name
            tensors[name] = tensor
    return NameMap(dict(sorted(tensors.items())), copies, frozenset(strangers))


def _tied_targets(network: nn.Module) -> frozenset[str]:
    tied: Any = getattr(network, "all_tied_weights_keys", None) or {}
    return frozenset(tied)
