"""Classes of the package described from their sources: arguments and docstrings, without importing anything."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import adamerge

PACKAGE = Path(adamerge.__file__).parent
FACTORIES = {"ParametrizationFactory": "Parametrization"}
"""Names of types that stand for something that makes one of a class."""


@dataclass(frozen=True)
class Argument:
    """One argument of a class, as the source has it.

    Attributes:
        name: of the argument.
        kind: its type.
        default: None where it must be given.
        told: what the docstring says.
    """

    name: str
    kind: str
    default: str | None
    told: str

    @property
    def part(self) -> str | None:
        """Public class of the package that the argument takes; None where it takes none."""
        words = [FACTORIES.get(word, word) for word in re.findall(r"\w+", self.kind)]
        return next((word for word in words if word in adamerge.__all__), None)


@dataclass(frozen=True)
class Description:
    """A class with its docstring and arguments, as the source has them.

    Attributes:
        name: of the class.
        told: the docstring before its sections.
        arguments: in order, those that must be given first, and of these the class's own before its ancestors'.
    """

    name: str
    told: str
    arguments: tuple[Argument, ...]


def described(path: str) -> Description | None:
    """Returns the description of the class of this public or full name; None where the package defines none."""
    name = path.rpartition(".")[2]
    definition = _definition(name)
    if definition is None or (path != name and not path.startswith("adamerge.")):
        return None
    told: dict[str, str] = {}
    arguments: dict[str, Argument] = {}
    own: dict[str, Argument] = {}  # after the loop those of the class itself
    for base in reversed(_ancestry(name)):
        told |= _documented(base)
        is_data = any(ast.unparse(mark).startswith("dataclass") for mark in base.decorator_list)
        own = {argument.name: argument for argument in (_fields(base) if is_data else _arguments(base))}
        arguments = {**arguments, **own} if is_data else own or arguments
    later = (
        {"task_vectors"} if "Parametrization" in {one.name for one in _ancestry(name)} else set()
    )  # given by the search
    summary = re.split(
        r"\n\s*(?:Args|Attributes|Raises|Returns):", inspect.cleandoc(ast.get_docstring(definition) or "")
    )
    return Description(
        name,
        summary[0].strip(),
        tuple(
            Argument(one.name, one.kind, one.default, told.get(one.name, ""))
            for one in sorted(
                arguments.values(), key=lambda one: 2 if one.default is not None else 1 if one.name not in own else 0
            )
            if one.name not in later
        ),
    )


def kinds_of(base: str) -> list[str]:
    """Returns the public names of all classes that are ``base`` or derive from it and are not abstract, sorted."""
    concrete = [
        name
        for name in adamerge.__all__
        if (definition := _definition(name)) is not None
        and base in {one.name for one in _ancestry(name)}
        and not _is_abstract(definition)
    ]
    return sorted(concrete)


def _is_abstract(definition: ast.ClassDef) -> bool:
    """Returns whether a class says that it is abstract, or leaves a method to those that derive from it."""
    bases = {ast.unparse(parent).partition("[")[0] for parent in definition.bases}
    left = {ast.unparse(one) for method in definition.body for one in getattr(method, "decorator_list", ())}
    return bool(bases & {"ABC", "Protocol"}) or "abstractmethod" in left


@cache
def _homes() -> dict[str, Path]:
    homes: dict[str, Path] = {}
    for path in sorted(
        PACKAGE.rglob("*.py"), key=lambda path: "testbed" not in path.parts
    ):  # the testbed's names yield
        homes.update(dict.fromkeys(re.findall(r"^class (\w+)", path.read_text(encoding="utf-8"), re.M), path))
    return homes


@cache
def _definition(name: str) -> ast.ClassDef | None:
    if name not in _homes():
        return None
    body = ast.parse(_homes()[name].read_text(encoding="utf-8")).body
    return next(node for node in body if isinstance(node, ast.ClassDef) and node.name == name)


def _ancestry(name: str) -> list[ast.ClassDef]:
    """Returns the definitions of a class and of its ancestors, as far as the package defines them."""
    definition = _definition(name)
    if definition is None:
        return []
    parents = [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in definition.bases]
    return [definition, *(one for parent in parents for one in _ancestry(parent))]


def _arguments(definition: ast.ClassDef) -> list[Argument]:
    for node in definition.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            names, rest = [*node.args.posonlyargs, *node.args.args], node.args
            defaults = [None] * (len(names) - len(rest.defaults)) + [ast.unparse(value) for value in rest.defaults]
            names += rest.kwonlyargs
            defaults += [None if value is None else ast.unparse(value) for value in rest.kw_defaults]
            return [
                Argument(one.arg, "" if one.annotation is None else ast.unparse(one.annotation), default, "")
                for one, default in zip(names, defaults, strict=True)
                if one.arg != "self"
            ]
    return []


def _fields(definition: ast.ClassDef) -> list[Argument]:
    return [
        Argument(node.target.id, ast.unparse(node.annotation), _field_default(node.value), "")
        for node in definition.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and not ast.unparse(node.annotation).startswith(("ClassVar", "KW_ONLY"))
    ]


def _field_default(value: ast.expr | None) -> str | None:
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "field":
        given = {word.arg: ast.unparse(word.value) for word in value.keywords}
        made = given.get("default_factory")
        return given.get("default") or (made and {"dict": "{}", "list": "[]"}.get(made, f"{made}()"))
    return None if value is None else ast.unparse(value)


def _documented(definition: ast.ClassDef) -> dict[str, str]:
    text = inspect.cleandoc(ast.get_docstring(definition) or "")
    section = re.search(r"^(?:Args|Attributes):\n((?:[ ]{4}.*\n?|\n)*)", text, re.M)
    entries = re.findall(r"^ {4}(\w+): ((?:.*\n?(?: {8}.*\n?)*))", section[1] if section else "", re.M)
    return {name: " ".join(told.split()) for name, told in entries}
