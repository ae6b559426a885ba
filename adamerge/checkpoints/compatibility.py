"""Compatibility: an expert has the base's tensors by name, shape and dtype, or the error says which to leave out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from adamerge.checkpoints.checkpoint import MERGEABLE, Checkpoint
from adamerge.checkpoints.name_patterns import excluding
from adamerge.checkpoints.obsolete_tensors import is_unmatched
from adamerge.errors import CheckpointError
from adamerge.io.untrusted_files import quoted

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
        return any(own is None or own.rank > 0 for own in factors)

    return [name for name in base if selects(name, include, exclude) and may_differ(name)]


def extra_names(base: Checkpoint, expert: Checkpoint, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Weights of an expert that the patterns leave and the base lacks."""
    # position ids and counters are never merged: old versions of libraries save some that new ones do not
    extra = [name for name in expert if name not in base and selects(name, include, exclude)]
    return [name for name in extra if expert.dtype(name) not in COUNTERS and not is_unmatched(name, base, expert)]


def refuse_other(task: str, expert: Checkpoint, base: Checkpoint, names: Sequence[str]) -> None:
    """Refuses an expert that lacks one of these tensors of the base, or has another under its name.

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
    """Refuses an expert for these tensors, which the base lacks, if there are any.

    Raises:
        CheckpointError: there are.
    """
    if names:
        rest = {*expert, *base}.difference(names)
        raise CheckpointError(
            f"expert '{task}' has {len(names)} tensors that the base lacks, first '{names[0]}'",
            where=expert.location,
            todo=f"{excluding(names, rest)}, or check which base the expert was trained from",
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


def refuse_twin(who: str, model: Checkpoint, others: Mapping[str, Checkpoint], names: Sequence[str]) -> None:
    """Refuses a model whose merged tensors are all those of another; reads them as far as they are the same.

    Args:
        who: the model is.
        model: which.
        others: by what messages call them.
        names: of the merged tensors.

    Raises:
        CheckpointError: it is the same as one of them.
    """
    for other, twin in others.items():
        if all(same_tensor(name, model, twin) for name in names):
            raise CheckpointError(
                f"{who} ({model.location}) has the same weights as {other}",
                todo="remove it: its coefficient could not be learned",
            )


def same_tensor(name: str, one: Checkpoint, other: Checkpoint) -> bool:
    """Returns whether a tensor is the same in two models; two adapters are compared by their factors."""
    factors, theirs = one.factors(name), other.factors(name)
    if factors is not None and theirs is not None:
        return factors.equals(theirs)
    return torch.equal(one[name], other[name])
