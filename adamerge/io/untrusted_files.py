"""Files from outside: only regular files are opened, JSON is of a bounded size, and names are quoted in messages."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from adamerge.errors import CheckpointError


def quoted(name: object) -> str:
    """Quotes a name or path from outside: escaped to one line, cut to 500 characters."""
    return repr(str(name)[:500])


def listed(names: Iterable[str]) -> str:
    """Quotes the first ten names in sorted order, and counts the rest."""
    names = sorted(names)
    return ", ".join(map(quoted, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Opens a regular file for reading; anything else is a CheckpointError naming it."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # asked before opening: opening a pipe would wait forever
            raise CheckpointError(f"{quoted(path)} is not a regular file")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{quoted(path)}: no such file", todo="check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a path that no system call accepts, such as one with a NUL
        raise CheckpointError(f"{quoted(path)} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def parse_object(text: bytes, place: str) -> dict[str, Any]:
    """Returns a JSON object, in which no key occurs twice; anything else is a CheckpointError naming its place."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):  # readers disagree on which of the two counts
            raise ValueError("a key occurs twice in one object")
        return members

    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{place} is not valid JSON: {error}", todo="copy or download the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{place} is not a JSON object", expected="{...}", got=type(value).__name__)
    return value


def read_json(path: Path, limit: int = 10_000_000) -> dict[str, Any]:
    """Reads a JSON object of at most ``limit`` bytes; anything else is a CheckpointError naming the file."""
    with opened(path) as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise CheckpointError(f"{quoted(path)} is too big", expected=f"at most {limit} bytes", got="more")
    return parse_object(text, quoted(path))
