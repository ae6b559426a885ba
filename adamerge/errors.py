"""Typed errors: what went wrong, where, what was expected and got, what to do; and the exit code each one means."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self


class AdamergeError(Exception):
    """Base of every error that is the input's fault and not the program's.

    Args:
        what: one line, complete in itself: names the file and the tensor or key.
        where: file, tensor or key, when ``what`` is not enough to find it.
        expected: what a correct input holds there.
        got: what was found instead.
        todo: one line that says what to do.

    What is None is not known, and not printed.
    """

    exit_code = 3

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        todo: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.got, self.todo = what, where, expected, got, todo
        lines = [what]
        if where is not None:
            lines.append(f"  where: {where}")
        known = [f"{word} {value}" for word, value in (("expected", expected), ("got", got)) if value is not None]
        if known:
            lines.append(f"  {', '.join(known)}")
        if todo is not None:
            lines.append(f"  what to do: {todo}")
        super().__init__("\n".join(lines))

    def told_of(self, whose: str, todo: str | None = None) -> Self:
        """Returns the same error whose first line begins with whose it is, where it does not say so.

        Args:
            whose: such as ``expert 'cars'``; nothing is put in front when empty.
            todo: what to do instead, if anything else.
        """
        said = re.search(rf"(?<!\S){re.escape(whose)}(?!\w)", self.what)
        what = self.what if said or not whose else f"{whose}: {self.what}"
        return type(self)(
            what, where=self.where, expected=self.expected, got=self.got, todo=self.todo if todo is None else todo
        )


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the known word that was probably meant, whatever its case; None where no spelling is near.

    Args:
        word: as it was given.
        known: words that may be meant.
        cutoff: similarity that is near, from 0 to 1.
    """
    import difflib  # an error alone needs it

    listed = list(known)
    near = difflib.get_close_matches(word, listed, 1, cutoff)
    if near:
        return near[0]
    lower = {one.lower(): one for one in reversed(listed)}
    near = difflib.get_close_matches(word.lower(), lower, 1, cutoff)
    return lower[near[0]] if near else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns the end of an error's first line that names the nearest known word; nothing where none is near."""
    near = nearest(word, known)
    return f"; did you mean '{near}'?" if near else ""


class ConfigError(AdamergeError):
    """A configuration that cannot be run: an unknown key, a number out of range, parts that do not fit together."""

    exit_code = 2


class CheckpointError(AdamergeError):
    """A model file or folder that cannot be used: missing, truncated, corrupt, unsafe, or unlike its base."""


class CoefficientsError(AdamergeError):
    """A coefficient file that cannot be used, or that belongs to other models."""


class DataError(AdamergeError):
    """Calibration or test data that cannot be used: empty, unreadable, or without the columns it needs."""


class DivergedError(AdamergeError):
    """A loss or gradient became non-finite; the last good coefficients were kept."""

    exit_code = 4


class CollapsedError(AdamergeError):
    """The merged model predicts one class for everything; the coefficients of that moment were kept."""

    exit_code = 4


class ExportError(AdamergeError):
    """An export that cannot be written or does not verify; what stood there before is unchanged."""

    exit_code = 5
