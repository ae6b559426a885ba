"""Renaming: names of an adapter or an expert to the base's on disk, which may stand under another prefix."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property

from adamerge.errors import CheckpointError
from adamerge.io.untrusted_files import listed, quoted

Exchange = tuple[str, str]
"""A prefix that is dropped, and the one that is put in its place."""


class Renaming:
    """Exchanges a prefix for another: ``bert.encoder.x`` is ``encoder.x`` on disk, ``layers.0.x`` is ``model.layers.0.x``.

    Each name drops the shortest prefix that makes it the ending of a name on disk. Where several endings fit, the one
    exchange of prefixes that fits decides: it leads all names to the disk that any exchange leads there, or leads them
    to all names on disk that any exchange reaches. Exchanges come from the blocks' numbered names where there are some:
    a head's ``dense.weight`` is the ending of many names.

    Args:
        place: what errors print.
        names: the names that must be found.
        disk: the names there are.
    """

    def __init__(self, place: str, names: Sequence[str], disk: Collection[str]) -> None:
        self._place, self._names, self._disk = place, names, disk
        # a block of each, to show where none or several fit
        self._found = {exchange: name for name in reversed(blocks(names)) for exchange in self._exchanges(name)}
        leads = {exchange: self._leads(exchange) for exchange in self._found}
        ours = {name for lead in leads.values() for name in lead}
        theirs = {other for lead in leads.values() for other in lead.values()}
        self._shared = {
            exchange for exchange, lead in leads.items() if lead.keys() == ours or {*lead.values()} == theirs
        }

    def find(self, name: str, key: str) -> str:
        """The name on disk of ``name``, one of ``names``.

        Raises:
            CheckpointError: none fits, or several do.
        """
        own = self._exchanges(name)
        changes = own if len(own) == 1 else own & self._shared
        if len(changes) != 1:
            fits = sorted(added + name.removeprefix(dropped) for dropped, added in own)
            raise CheckpointError(
                f"{self._place}: {quoted(name)} is {'several tensors' if fits else 'no tensor'} of the base",
                where=key,
                expected="one whose name ends so",
                got=fits[:5] or "none",
                todo="check that it belongs to this base (a head that is tied to the embedding has no tensor of its own)",
            )
        [(dropped, added)] = changes
        return added + name.removeprefix(dropped)

    def find_if_there(self, name: str) -> str:
        """The name on disk of any other ``name``, or ``name`` itself where the disk has none: a head of its own."""
        there = self._there(name)
        return there.pop() if len(there) == 1 else name

    def find_all(self) -> dict[str, str]:
        """Name on disk to each of ``names``, by one exchange for all; a name that the disk lacks keeps its own.

        Raises:
            CheckpointError: several exchanges fit, none fits all, or two names are one on disk.
        """
        if self._found and len(self._shared) != 1:
            pairs = sorted((name, added + name.removeprefix(dropped)) for (dropped, added), name in self._found.items())
            some = ", ".join(f"{quoted(name)} as {quoted(other)}" for name, other in pairs[:4])
            raise CheckpointError(
                f"{self._place} fits this base in several ways: {some}",
                expected="one prefix in the place of another, that fits the whole file",
                got=f"{len(pairs)}, of which {len(self._shared) or 'none'} would do",
                todo="save it under the base's own names",
            )
        matched: dict[str, str] = {}
        for name in self._names:
            there = self._there(name) or {name}
            twice = matched.keys() & there
            if len(there) > 1 or twice:
                names = sorted({name, *(matched[other] for other in twice)})
                raise CheckpointError(
                    f"{self._place}: {listed(names)} would be {listed(there)} of the base",
                    expected="one tensor of the base for each of its own",
                    got=f"{len(names)} and {len(there)}",
                    todo="save it under the base's own names",
                )
            matched[there.pop()] = name
        return matched

    def _there(self, name: str) -> set[str]:
        """The name itself and what it is renamed to, as far as they are on disk."""
        renamed = {added + name.removeprefix(dropped) for dropped, added in self._shared if name.startswith(dropped)}
        return {other for other in (name, *renamed) if other in self._disk}

    def _leads(self, exchange: Exchange) -> dict[str, str]:
        """Each name that the exchange leads to one on disk."""
        dropped, added = exchange
        renamed = {name: added + name.removeprefix(dropped) for name in self._names if name.startswith(dropped)}
        return {name: other for name, other in renamed.items() if other in self._disk}

    def _exchanges(self, name: str) -> set[Exchange]:
        """Exchanges that lead to a name on disk; the least dropped that does."""
        if name in self._disk:
            return {("", "")}
        for rest in _endings(name):
            if rest.partition(".")[0].isdigit():
                break  # a block's number, and what is numbered, are never part of a prefix
            if rest in self._ends:
                return {(name.removesuffix(rest), added) for added in self._ends[rest]}
        return set()

    @cached_property
    def _ends(self) -> dict[str, list[str]]:
        """Each ending of names on disk to what stands before it."""
        ends = defaultdict(list)
        for name in self._disk:
            for rest in _endings(name):
                ends[rest].append(name.removesuffix(rest))
        return dict(ends)


def blocks(names: Iterable[str]) -> list[str]:
    """The names that tell whose they are: those with a number in them; all where none has one."""
    names = list(names)
    return [name for name in names if any(part.isdigit() for part in name.split("."))] or names


def _endings(name: str) -> list[str]:
    """The name, and what is left of it without its first parts; two parts at least."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1)]
