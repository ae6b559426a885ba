"""Versions: files say which version of the program wrote them, and those of a later one are refused."""

from __future__ import annotations

import re
from pathlib import Path

import adamerge
from adamerge.errors import AdamergeError

WRITTEN_BY = f"adamerge {adamerge.__version__}"
"""What a text file says in its first line, a comment."""


def refuse_later(version: object, path: str | Path, kind: type[AdamergeError]) -> None:
    """Raises an error of this kind where a file was written by a later version; the last of its three numbers does not count.

    Args:
        version: as the file says; what is no version is left to whoever reads the file.
        path: of the file.
        kind: of the error.
    """
    theirs, ours = _numbers(version), _numbers(adamerge.__version__)
    if theirs > ours:
        raise kind(
            f"{path} was written by adamerge {version}, and this is adamerge {adamerge.__version__}",
            todo=f"pip install 'adamerge>={version}', or make the file again with this version",
        )


def version_of(text: str) -> str | None:
    """Returns the version that a text file's first line names; None where it names none."""
    match = re.match(r"# adamerge (\d\S*)\s*(?:\n|$)", text)
    return match[1] if match else None


def _numbers(version: object) -> tuple[int, ...]:
    match = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return tuple(map(int, match.groups())) if match else ()
