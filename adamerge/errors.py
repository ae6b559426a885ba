"""Typed errors: what went wrong, where, what was expected and got, what to do; and the exit code each one means."""

from __future__ import annotations


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
