"""Where the language models' texts come from: source code, templates, glosses and translations; all inside wheels.

A source hands out documents, each a name and a text; it knows nothing of splits or tokens.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Document:
    """What stays whole when texts are split: a file, a section of a word list, some messages of a translation."""

    name: str
    text: str


class TextSource(Protocol):
    """The documents of one domain."""

    @property
    def distributions(self) -> tuple[str, ...]:
        """Whose files they are, as the package index calls them."""
        ...

    def documents(self) -> list[Document]:
        """Read all documents, sorted by name."""
        ...


def package_folder(package: str) -> Path:
    """Find the folder of an installed package without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"the testbed's texts need the package {package!r}. Run: pip install 'adamerge[demo]'"
        )
    return Path(spec.origin).parent


def versions(source: TextSource) -> str:
    """Name what is installed of the source's distributions: the texts are as fixed as these versions."""
    return " ".join(f"{name}=={importlib.metadata.version(name)}" for name in source.distributions)


class Files:
    """Files of a package that match a pattern, without the licence header that all of them share."""

    def __init__(self, distribution: str, packages: Sequence[str], patterns: Sequence[str], header: str = "") -> None:
        """Take ``patterns`` below each of ``packages``; ``header`` is a regular expression that matches at the start."""
        self.distributions: tuple[str, ...] = (distribution,)
        self.packages, self.patterns, self.header = tuple(packages), tuple(patterns), header

    def documents(self) -> list[Document]:
        """Read every file as UTF-8."""
        found = {}
        for package in self.packages:
            folder = package_folder(package)
            for pattern in self.patterns:
                for file in folder.glob(pattern):
                    if file.is_file():
                        text = re.sub(self.header, "", file.read_text(encoding="utf-8"), count=1)
                        found[f"{package}/{file.relative_to(folder).as_posix()}"] = text
        return [Document(name, found[name]) for name in sorted(found)]


class Lines:
    """A file of tab-separated lines whose last field is a text of its own; so many lines are a document."""

    def __init__(self, distribution: str, package: str, path: str, lines: int) -> None:
        self.distributions: tuple[str, ...] = (distribution,)
        self.package, self.path, self.lines = package, path, lines

    def documents(self) -> list[Document]:
        """Read the last fields, a document for every ``lines`` of them."""
        text = package_folder(self.package).joinpath(*self.path.split("/")).read_text(encoding="utf-8")
        fields = [line.rsplit("\t", 1)[-1] for line in text.splitlines()]
        starts = range(0, len(fields), self.lines)
        return [Document(f"{start:06d}", "\n".join(fields[start : start + self.lines])) for start in starts]


class Translations:
    """Translated messages of gettext catalogues.

    A document is a run of messages that stand together in the sorted catalogue, in ALL its languages: a message and its
    translation into a sister language are never in two splits.
    """

    def __init__(self, catalogues: Sequence[tuple[str, str, str]], languages: Sequence[str], messages: int) -> None:
        """Take ``catalogues``: (distribution, package, path with ``{}`` for the language); ``messages`` a document."""
        self.catalogues, self.languages, self.messages = tuple(catalogues), tuple(languages), messages
        self.distributions = tuple(dict.fromkeys(distribution for distribution, _, _ in catalogues))

    def documents(self) -> list[Document]:
        """Read what is translated, and not the same as its original."""
        found = []
        for _, package, path in self.catalogues:
            folder = package_folder(package)
            texts: dict[str, dict[str, str]] = {}  # original -> language -> translation
            for language in self.languages:
                file = folder.joinpath(*path.format(language).split("/"))
                for original, translated in (read_catalogue(file) if file.is_file() else {}).items():
                    if translated != original:
                        texts.setdefault(original, {})[language] = translated
            originals = sorted(texts)
            for start in range(0, len(originals), self.messages):
                run = [texts[original] for original in originals[start : start + self.messages]]
                lines = [text[language] for language in self.languages for text in run if language in text]
                found.append(Document(f"{package}/{path}/{start:06d}", "\n".join(lines)))
        return found


def read_catalogue(file: Path) -> dict[str, str]:
    """Read a gettext .mo file: original -> translation, of plurals the first form, without the header.

    Reference: GNU gettext manual, "The Format of GNU MO Files",
    https://www.gnu.org/software/gettext/manual/html_node/MO-Files.html.
    """
    data = file.read_bytes()
    order = "<" if data[:4] == b"\xde\x12\x04\x95" else ">"
    count, originals, translations = struct.unpack_from(f"{order}3I", data, 8)

    def text(table: int, place: int) -> str:
        length, offset = struct.unpack_from(f"{order}2I", data, table + 8 * place)
        return data[offset : offset + length].split(b"\0")[0].decode()

    pairs = ((text(originals, place), text(translations, place)) for place in range(count))
    return {original: translated for original, translated in pairs if original and translated}


def chunks(text: str, size: int) -> list[str]:
    """Cut a text into runs of whole lines of at most ``size`` bytes; only a longer line is cut, at a space if it has one."""
    pieces: list[str] = []
    for line in text.splitlines():
        while len(line.encode()) > size:
            head = line.encode()[:size].decode(errors="ignore")
            place = head.rfind(" ")
            cut = place + 1 if place > 0 else len(head)
            pieces.append(line[:cut])
            line = line[cut:]
        pieces.append(line)
    runs: list[str] = []
    for piece in pieces:
        if runs and len(f"{runs[-1]}\n{piece}".encode()) <= size:
            runs[-1] += f"\n{piece}"
        else:
            runs.append(piece)
    return [run for run in (run.strip("\n").rstrip() for run in runs) if run]


def fingerprint(text: str) -> str:
    """A hash by which documents are put into an order that has nothing to do with their content."""
    return hashlib.sha256(text.encode()).hexdigest()
