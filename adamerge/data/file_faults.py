"""Faults of data files: the first line that is wrong, found once a library could not read a file."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

OPENERS: dict[str, Callable[[Path, str], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""How compressed files are opened, by the ending of their names."""

LONGEST = 300  # characters of a library's own message that are worth repeating


def fault_of(path: Path, kind: str, error: BaseException) -> str:
    """Returns what is wrong with a data file that a library could not read, with the number of the line where it can be told.

    Args:
        path: of the file.
        kind: ``json``, ``csv``, ``text`` or ``parquet``.
        error: the library's.
    """
    told = cause(error)
    try:
        if kind != "parquet":
            return _fault_of_text(path, kind, told) or told
        return "it is empty" if path.stat().st_size == 0 else told
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        return f"it is cut short or damaged: {error}"
    except OSError as error:
        return error.strerror or str(error)


def cause(error: BaseException) -> str:
    """Returns what a library's error says of its cause: the innermost message that no other of the library's covers."""
    chain: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None:
        chain.append(seen)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    told = [one for one in chain if str(one).strip() and "occurred while generating" not in str(one)]
    # of JSON, the next error is that of a second attempt in another way
    best = next((one for one in told if str(one).startswith("JSON parse error")), told[-1] if told else error)
    text = " ".join(str(best).split()) or type(best).__name__
    if "corresponds to no data" in text or "at least one example" in text:
        return "it has no rows"
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def _fault_of_text(path: Path, kind: str, told: str) -> str | None:
    empty = True
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            empty = empty and not line.strip()
            try:
                line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                return f"line {number} is not UTF-8 (byte 0x{line[error.start]:02x}); save the file as UTF-8"
    if empty:
        return "it is empty"
    if kind == "csv":
        return _change(_csv_rows(path), told)
    if kind == "json":
        return _fault_of_json(path, told)
    return None


def _fault_of_json(path: Path, told: str) -> str | None:
    with _opened(path) as file:
        text = file.read().decode("utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            json.loads(text)
        except json.JSONDecodeError as error:
            return f"line {error.lineno} is no JSON: column {error.colno}, {error.msg.removesuffix(' at')}"
        except (ValueError, RecursionError) as error:
            return f"it is no JSON: {error}"
        return None
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            return f"line {number} is no JSON: column {error.colno}, {error.msg.removesuffix(' at')}"
        except (ValueError, RecursionError) as error:
            return f"line {number} is no JSON: {error}"
        if not isinstance(row, dict):
            return f"line {number} is no JSON object: {line.strip()[:40]}"
        rows.append((number, row))
    return _change(iter(rows), told)


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with _opened(path) as file:
        lines = (line.decode("utf-8-sig") for line in file)
        separator = "\t" if ".tsv" in path.name.lower() else ","
        rows = csv.reader(lines, delimiter=separator)
        names = next(rows, [])
        for row in rows:
            yield rows.line_num, dict(zip(names, map(_number, row), strict=False))


def _number(text: str) -> Any:
    """Returns what a field of a CSV file holds; None where it is empty."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def _change(rows: Iterator[tuple[int, dict[str, Any]]], told: str) -> str | None:
    """Returns the first line whose columns, or a value's kind, differ from those before it, if the library said so."""
    columns, values = "column names" in told, "parse string" in told or "truncated" in told
    kinds: dict[str, tuple[int, type]] = {}
    start = None
    for number, row in rows:
        start = number if start is None else start
        for name, value in row.items():
            if columns and number > start and name not in kinds:
                return f"line {number} has a column '{name}', which line {start} lacks"
            first, kind = kinds.setdefault(name, (number, type(value)))
            if kind is type(None):
                kinds[name] = number, type(value)
            elif values and value is not None and kind is not type(value):
                return (
                    f"line {number}: column '{name}' holds {str(value)[:40]!r}, {_word(type(value))},"
                    f" where line {first} holds {_word(kind)}"
                )
    return None


def _word(kind: type) -> str:
    return {int: "a whole number", float: "a fraction", str: "a text", bool: "a truth value", list: "a list"}.get(
        kind, "an object"
    )


def _opened(path: Path) -> BinaryIO:
    return (
        cast(BinaryIO, OPENERS[path.suffix.lower()](path, "rb")) if path.suffix.lower() in OPENERS else path.open("rb")
    )
