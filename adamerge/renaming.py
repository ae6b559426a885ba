"""Renaming: an adapter's names to the base's on disk, which may stand under another prefix."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from adamerge.errors import CheckpointError
from adamerge.files import quoted


class Renaming:
    """Exchanges a prefix for another: ``bert.encoder.x`` is ``encoder.x`` on disk, ``layers.0.x`` is ``model.layers.0.x``.

    Each name drops the shortest prefix that makes it the ending of a name on disk. Where several endings fit, the one
    exchange of prefixes that fits all names decides.

    Args:
        place: what errors print.
        names: the names that must be found.
        disk: the names there are.
    """

    def __init__(self, place: str, names: Sequence[str], disk: Collection[str]) -> None:
        self._place, self._disk = place, disk
        exchanges = [self._exchanges(name) for name in names]
        self._shared = set.intersection(*exchanges) if exchanges else set()

    def find(self, name: str, key: str) -> str:
        """The name on disk of ``name``, one of ``names``.

        Raises:
            CheckpointError: none fits, or several do.
        """
        own = self._exchanges(name)
        found = own if len(own) == 1 else own & self._shared
        if len(found) != 1:
            fits = sorted(added + name.removeprefix(dropped) for dropped, added in own)
            raise CheckpointError(
                f"{self._place}: {quoted(name)} is {'several tensors' if fits else 'no tensor'} of the base",
                where=key,
                expected="one whose name ends so",
                got=fits[:5] or "none",
                todo="check that it belongs to this base (a head that is tied to the embedding has no tensor of its own)",
            )
        [(dropped, added)] = found
        return added + name.removeprefix(dropped)

    def find_if_there(self, name: str) -> str:
        """The name on disk of any other ``name``, or ``name`` itself where the disk has none: a head of its own."""
        renamed = {added + name.removeprefix(dropped) for dropped, added in self._shared}
        there = {other for other in (name, *renamed) if other in self._disk}
        return there.pop() if len(there) == 1 else name

    def _exchanges(self, name: str) -> set[tuple[str, str]]:
        """Prefixes (dropped, added) that lead to a name on disk; the least dropped that does."""
        if name in self._disk:
            return {("", "")}
        parts = name.split(".")
        for start in range(len(parts) - 1):
            if parts[start].isdigit():
                break  # a block's number, and what is numbered, are never part of a prefix
            rest = ".".join(parts[start:])
            ends = {other.removesuffix(rest) for other in self._disk if f".{other}".endswith(f".{rest}")}
            if ends:
                return {(name.removesuffix(rest), end) for end in ends}
        return set()
