"""Patterns of tensor names: the block that a name is of, and globs that stand for many names to be left out."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

MOST = 40
"""Patterns that are worth listing in an error."""


def numbered_prefix(name: str) -> str | None:
    """Returns a tensor's block: its name up to the first integer, ``layers.3`` of ``layers.3.mlp.weight``, or None."""
    match = re.match(r".*?\.\d+(?=\.|$)", name)
    return match.group() if match else None


def excluding(names: Sequence[str], others: Collection[str]) -> str:
    """The advice that leaves these names out, and none of the others."""
    patterns = globs(names, others)
    rest = f" and {len(patterns) - MOST} more" if len(patterns) > MOST else ""
    return f"pass exclude={patterns[:MOST]}{rest}"


def globs(names: Sequence[str], others: Collection[str]) -> list[str]:
    """A few glob patterns for these names that match none of the others, such as ``text_model.*`` or ``*.running_mean``.

    A pattern stands for several names; one alone is named. Each is the one that covers most of what is left, and of equals
    the plainest: the beginning of a name, its end, both, any numbers in it.

    Args:
        names: to be matched.
        others: not to be matched.
    """
    if not names:
        return []
    taken = {pattern for name in others for pattern in _patterns(name)}
    covered: dict[str, set[str]] = {}
    for name in names:
        for pattern in _patterns(name):
            if pattern not in taken:
                covered.setdefault(pattern, set()).add(name)
    numbered: dict[str, set[str]] = {}
    for name in names:
        numbered.setdefault(re.sub(r"\d+", "*", name), set()).add(name)
    free = {
        pattern: some
        for pattern, some in numbered.items()
        if len(some) > 1 and not any(fnmatchcase(name, pattern) for name in others)
    }
    covered = {pattern: some for pattern, some in covered.items() if len(some) > 1} | free
    left, patterns = set(names), []
    while left:
        best = max(covered, key=lambda pattern: len(covered[pattern] & left), default=None)
        if best is None or len(covered[best] & left) < 2:
            break
        patterns.append(best)
        left -= covered[best]
    first = {pattern: next(i for i, name in enumerate(names) if name in covered[pattern]) for pattern in patterns}
    alone = {name: i for i, name in enumerate(names) if name in left}
    return sorted([*first, *alone], key={**first, **alone}.__getitem__)


def _patterns(name: str) -> list[str]:
    """Patterns for a name of parts, from plain to less so: ``a.*``, ``a.b.*``, ``*.c``, ``*.b.c``, ``a.*.c`` of ``a.b.c``."""
    parts = name.split(".")
    count = len(parts)
    heads = {end: ".".join(parts[:end]) for end in range(1, count)}
    tails = {start: ".".join(parts[start:]) for start in range(count - 1, 0, -1)}
    both = [f"{heads[end]}.*.{tails[start]}" for end in heads for start in tails if start > end]
    return [*(f"{head}.*" for head in heads.values()), *(f"*.{tail}" for tail in tails.values()), *both]
