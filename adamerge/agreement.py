"""Agreement: expert and network have the base's tensors by name and shape, or one is told what is wrong or to be left out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from adamerge.adapters import AdapterCheckpoint
from adamerge.checkpoint import MERGEABLE, Checkpoint
from adamerge.errors import CheckpointError
from adamerge.files import quoted
from adamerge.leftovers import is_leftover, is_unmatched
from adamerge.patterns import excluding

COUNTERS = frozenset({torch.int64, torch.bool})
"""Dtypes of position ids, step counters and masks: buffers that stay the base's. Other integers are quantised weights."""


def selects(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether glob patterns leave a name: all are included when ``include`` is empty."""
    included = not include or any(fnmatchcase(name, pattern) for pattern in include)
    return included and not any(fnmatchcase(name, pattern) for pattern in exclude)


def names_to_merge(
    base: Checkpoint, experts: Collection[Checkpoint], include: Sequence[str], exclude: Sequence[str]
) -> list[str]:
    """Tensors of the base that the patterns leave, and that some expert can have changed."""

    def may_differ(name: str) -> bool:
        if base.dtype(name) in COUNTERS or any(is_unmatched(name, base, expert) for expert in experts):
            return False
        factors = (expert.factors(name) if name in expert else None for expert in experts)
        return any(found is None or found.rank > 0 for found in factors)

    return [name for name in base if selects(name, include, exclude) and may_differ(name)]


def extra_names(base: Checkpoint, expert: Checkpoint, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Weights of an expert that the patterns leave and the base lacks."""
    # position ids and counters are never merged: old versions of libraries save some that new ones do not
    extra = [name for name in expert if name not in base and selects(name, include, exclude)]
    return [name for name in extra if expert.dtype(name) not in COUNTERS and not is_unmatched(name, base, expert)]


def refuse_other(task: str, expert: Checkpoint, base: Checkpoint, names: Sequence[str]) -> None:
    """Refuse an expert that lacks one of these tensors of the base, or has another under its name.

    Raises:
        CheckpointError: it does, by the first name that is wrong, and by the globs of all that are missing.
    """
    for error in differences(task, expert, base, names):
        raise error


def differences(task: str, expert: Checkpoint, base: Checkpoint, names: Sequence[str]) -> Iterator[CheckpointError]:
    """What is wrong with these tensors of an expert, in their order; all that are missing as one error.

    Each says how to leave out all that are wrong, at once.
    """
    lacking = [name for name in names if name not in expert]
    other = [name for name in names if name in expert and expert.shape(name) != base.shape(name)]
    models = ((f"expert '{task}'", expert), ("the base", base))
    unmergeable = {
        name: [(who, model) for who, model in models if model.dtype(name) not in MERGEABLE]
        for name in names
        if name in expert
    }
    wrong = {*lacking, *other, *(name for name, whose in unmergeable.items() if whose)}
    leave = excluding([name for name in names if name in wrong], {*base, *expert} - wrong)
    for name in names:
        if name not in expert:
            if name == lacking[0]:
                yield _lacking(task, expert, base, names, leave)
            continue
        if name in other:
            own = expert.own_name(name)
            yield CheckpointError(
                f"expert '{task}': '{name}'{'' if own == name else f', there {quoted(own)},'} has another shape than in"
                " the base",
                where=expert.location,
                expected=tuple(base.shape(name)),
                got=tuple(expert.shape(name)),
                todo=f"{leave} to leave what differs at the base, or check the checkpoint",
            )
        for who, model in unmergeable[name]:
            yield CheckpointError(
                f"{who}: '{name}' is {model.dtype(name)}, which cannot be merged",
                where=model.location,
                expected="float64, float32, float16 or bfloat16",
                got=model.dtype(name),
                todo=f"{leave}, or dequantise the checkpoint",
            )


def refuse_extra(task: str, expert: Checkpoint, base: Checkpoint, names: Sequence[str]) -> None:
    """Refuse an expert for these tensors, which the base lacks, if there are any.

    Raises:
        CheckpointError: there are.
    """
    if names:
        kept = {*expert, *base}.difference(names)
        raise CheckpointError(
            f"expert '{task}' has {len(names)} tensors that the base lacks, first '{names[0]}'",
            where=expert.location,
            todo=f"{excluding(names, kept)}, or check which base the expert was trained from",
        )


def refuse_other_network(
    network: str, tensors: Mapping[str, torch.Tensor], base: Checkpoint, ignores: Callable[[str], bool]
) -> None:
    """Refuse a base whose tensors are not those of the network, by name and shape.

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
    """Refuse experts that lack, or have otherwise, what is a leftover by its name, where the network has a place for it.

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
    """Refuse adapters that change one of two places that share a weight: peft leaves the other as the base has it.

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
    """Refuse to merge by gradients what takes none.

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
    """Refuse models in memory that are the network's own tensors: each merge would overwrite what it reads.

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


def _lacking(task: str, expert: Checkpoint, base: Checkpoint, names: Sequence[str], leave: str) -> CheckpointError:
    missing, there = [name for name in names if name not in expert], [name for name in names if name in expert]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    leave = f"{leave} to leave {'them' if more else 'it'} at the base, or check the checkpoint"
    return CheckpointError(
        f"expert '{task}' lacks '{missing[0]}'{more} (base has {len(base)} tensors, this one {len(expert)})",
        where=expert.location,
        expected=f"the {len(names)} tensors to merge",
        got=f"{len(there)} of them",
        todo=leave if there else "check that it is an expert of this base: it has none of these tensors",
    )
