"""What people write around Python code: docstrings, comments, messages, read from installed sources without running them.

``harvest("networkx")`` gives every such text of a package with the role it plays there.
"""

from __future__ import annotations

import ast
import hashlib
import re
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from adamerge.testbed.text_files import package_folder

FILES = 220  # read per package at most, those whose path has the lowest hash
BYTES = 120_000  # a longer file is a generated one more often than not
ROLES = ("function", "class", "comment", "error", "warning", "help", "log", "parameter")
_LOG_METHODS = frozenset({"debug", "info", "warning", "error", "exception", "critical"})
_LOGGERS = frozenset({"logger", "log", "logging", "_logger", "LOG", "_log", "_LOGGER", "LOGGER"})
_COMMENT = re.compile(r"\s*# ([A-Z].{15,})$")
# A section on parameters, and what parts a parameter's name from its explanation there.
_PARAMETERS = (
    (re.compile(r"^Parameters\n[-=]{3,}\n(.*?)(?=^\w[\w ]*\n[-=]{3,}\n|\Z)", re.MULTILINE | re.DOTALL), "\n"),
    (re.compile(r"^(?:Args|Arguments|Parameters):\n((?:[ ]+[^\n]*(?:\n|\Z)|\n)+)", re.MULTILINE), ": "),
)


class Text(NamedTuple):
    """A text, the role it plays in the source, and for an error the name of the exception that carries it."""

    role: str
    text: str
    error: str = ""


@lru_cache(maxsize=64)
def harvest(package: str) -> tuple[Text, ...]:
    """Collect the texts of ``package``'s Python files, tests left out; the same ones in the same order every time."""
    root = package_folder(package)
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    names = [name for name in names if not re.search(r"(^|/|_)tests?(/|_|\.)|(^|/)test|site-packages/|/_?vendor", name)]
    names.sort(key=lambda name: hashlib.sha256(name.encode()).digest())
    return tuple(text for name in names[:FILES] for text in _texts(root / name) if text.text)


def first_sentence(docstring: str) -> str:
    """Return the docstring's first paragraph up to its first full stop, on one line."""
    paragraph = docstring.strip().split("\n\n")[0]
    return re.split(r"(?<=[a-z)`'\"]\.)\s", " ".join(paragraph.split()), maxsplit=1)[0]


def _texts(file: Path) -> Iterator[Text]:
    try:
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source) if len(source) <= BYTES else None
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return  # templates and deliberately broken files lie among the sources
    if tree is None:
        return
    strings: set[int] = set()  # lines inside a string: what looks like a comment there is not one
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.end_lineno != node.lineno:
            strings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from _docstring(node)
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            if isinstance(node.exc.func, ast.Name) and (message := _literal(node.exc.args[0])):
                yield Text("error", message, node.exc.func.id)
        elif isinstance(node, ast.Call):
            yield from _call(node)
    for number, line in enumerate(source.split("\n"), start=1):
        if number not in strings and (match := _COMMENT.match(line)):
            yield Text("comment", match[1])


def _docstring(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> Iterator[Text]:
    docstring = ast.get_docstring(node)
    if not docstring:
        return
    yield Text("class" if isinstance(node, ast.ClassDef) else "function", first_sentence(docstring))
    for section, separator in _PARAMETERS:
        if match := section.search(docstring):
            for entry in re.split(r"^(?=\S)", textwrap.dedent(match[1]), flags=re.MULTILINE):
                yield Text("parameter", first_sentence(entry.partition(separator)[2]))


def _call(node: ast.Call) -> Iterator[Text]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    owner = node.func.value if isinstance(node.func, ast.Attribute) else None
    if name == "warn" and node.args and (message := _literal(node.args[0])):
        yield Text("warning", message)
    elif name in _LOG_METHODS and isinstance(owner, ast.Name) and owner.id in _LOGGERS and node.args:
        yield Text("log", _literal(node.args[0]))
    for keyword in node.keywords:
        if keyword.arg in ("help", "help_text") and (message := _literal(keyword.value)):
            yield Text("help", message)


def _literal(node: ast.AST) -> str:
    """Return the text of a string literal, with {} for what an f-string fills in; otherwise nothing."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)  # type: ignore[misc]
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mod, ast.Add)):
        return _literal(node.left)
    if isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        return _literal(node.func.value)
    return ""
