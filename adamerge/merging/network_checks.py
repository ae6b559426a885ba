"""Checks of a network against its base and experts: names and shapes, ties, buffers, shared memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from adamerge.checkpoints.checkpoint import Checkpoint
from adamerge.checkpoints.compatibility import COUNTERS, refuse_other
from adamerge.checkpoints.lora import AdapterCheckpoint
from adamerge.checkpoints.name_patterns import excluding
from adamerge.checkpoints.obsolete_tensors import is_leftover, is_unmatched
from adamerge.errors import CheckpointError

if TYPE_CHECKING:
    from adamerge.backbones import Backbone  # only for annotations: export must not load the networks' libraries


def check_network(
    backbone: Backbone, tensors: Mapping[str, torch.Tensor], base: Checkpoint, experts: Mapping[str, Checkpoint]
) -> None:
    """Checks whether a network, before it is filled, is that of base and experts.

    Args:
        backbone: the network.
        tensors: of the backbone, by on-disk name.
        base: of the experts.
        experts: by task.

    Raises:
        CheckpointError: it is not, or they are in its memory.
    """
    refuse_other_network(type(backbone).__name__, tensors, base, backbone.ignores)
    refuse_unlike_leftovers(tensors, base, experts)
    backbone.check_base(base)
    refuse_half_ties(backbone.tied(), experts)
    refuse_shared_memory(tensors, {"the base": base, **experts})


def refuse_other_network(
    network: str, tensors: Mapping[str, torch.Tensor], base: Checkpoint, ignores: Callable[[str], bool]
) -> None:
    """Refuses a base whose tensors are not those of the network, by name and shape.

    Args:
        network: what it is called.
        tensors: of the network.
        base: of the experts.
        ignores: whether the network has no use for a tensor of the base.

    Raises:
        CheckpointError: they are not, by the first that is wrong.
    """
    missing = [name for name in tensors if name not in base]
    extra = [
        name for name in base if name not in tensors and not ignores(name) and not is_leftover(name, base.shape(name))
    ]
    if missing or extra:
        raise CheckpointError(
            f"base {base.location} {'lacks' if missing else 'has unexpected'} '{(missing or extra)[0]}'",
            expected=f"the {len(tensors)} tensors of {network}",
            got=f"{len(missing)} missing, {len(extra)} unexpected",
            todo="check that the backbone's architecture is the base's",
        )
    for name, tensor in tensors.items():
        if base.shape(name) != tensor.shape:
            raise CheckpointError(
                f"base {base.location}: '{name}' has another shape than in the backbone",
                expected=tuple(tensor.shape),
                got=tuple(base.shape(name)),
                todo="check that the backbone's architecture is the base's",
            )


def refuse_unlike_leftovers(names: Collection[str], base: Checkpoint, experts: Mapping[str, Checkpoint]) -> None:
    """Refuses experts that lack, or have otherwise, what is a leftover by its name, where the network has a place for it.

    Args:
        names: of the network's tensors.
        base: of the experts.
        experts: by task.

    Raises:
        CheckpointError: there is one.
    """
    places = [name for name in names if is_leftover(name, base.shape(name)) and base.dtype(name) not in COUNTERS]
    for task, expert in experts.items():
        refuse_other(task, expert, base, [name for name in places if is_unmatched(name, base, expert)])


def refuse_half_ties(tied: Collection[str], experts: Mapping[str, Checkpoint]) -> None:
    """Refuses adapters that change one of two places that share a weight: peft leaves the other as the base has it.

    Args:
        tied: on-disk names of tensors that the network uses in several places.
        experts: by task.

    Raises:
        CheckpointError: there is one.
    """
    for task, expert in experts.items():
        if not isinstance(expert, AdapterCheckpoint) or expert.config.get("ensure_weight_tying"):
            continue
        changed = next((name for name in sorted(tied) if expert.changes(name)), None)
        if changed is not None:
            raise CheckpointError(
                f"expert '{task}' is an adapter of '{changed}', which the network uses in several places and the adapter "
                "in one",
                where=expert.location,
                expected="an adapter that leaves it, or one trained with ensure_weight_tying",
                got="another head than embedding, where this network has one tensor for both",
                todo="merge adapter and base with peft into a model whose weights are untied, and the base likewise",
            )


def refuse_untrainable(merged: Mapping[str, torch.Tensor], selected: Sequence[str], base: Checkpoint) -> None:
    """Refuses to merge by gradients what takes none.

    Args:
        merged: the network's own tensors that are to be merged, by name.
        selected: names that the patterns leave.
        base: of the experts.

    Raises:
        CheckpointError: one of them is no parameter, or there is none.
    """
    if not merged:
        raise CheckpointError(
            "nothing is merged that the network uses",
            where=base.location,
            expected="tensors of the network among those that include and exclude leave",
            got=selected[:3],
            todo="widen task_vectors.include, or narrow task_vectors.exclude",
        )
    buffers = [name for name, tensor in merged.items() if not isinstance(tensor, torch.nn.Parameter)]
    if buffers:
        more = f" (and {len(buffers) - 1} more)" if len(buffers) > 1 else ""
        raise CheckpointError(
            f"'{buffers[0]}'{more} is a buffer, not a parameter, and cannot be merged by gradients",
            where=base.location,
            todo=f"{excluding(buffers, set(base).difference(buffers))}: buffers stay the base's",
        )


def refuse_shared_memory(tensors: Mapping[str, torch.Tensor], models: Mapping[str, Checkpoint]) -> None:
    """Refuses models in memory that are the network's own tensors: each merge would overwrite what it reads.

    Args:
        tensors: of the network.
        models: what each is called, and the model.

    Raises:
        CheckpointError: there is one.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()} - {0}
    for who, model in models.items():
        # files are never the network's memory
        shared = next(
            (name for name in (() if model.sources else model) if model[name].untyped_storage().data_ptr() in own), None
        )
        if shared is not None:
            raise CheckpointError(
                f"'{shared}' of {who} is in the memory of the network itself, which each merge fills",
                where=model.location,
                todo="pass copies, such as {name: tensor.clone() for name, tensor in network.state_dict().items()}",
            )
