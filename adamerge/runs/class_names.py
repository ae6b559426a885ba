"""Classes by their names in a configuration, full or short; where there is none, the one that was probably meant."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

import adamerge
from adamerge.errors import ConfigError
from adamerge.runs.class_descriptions import kinds_of

NOUNS = {"Calibration": "data class", "TeacherCache": "cache of teachers"}
"""What classes are called whose names do not say it."""


def class_named(key: str, name: str, kind: type) -> Any:
    """What a full or a short name stands for.

    Raises:
        ConfigError: there is nothing of that name.
    """
    module, _, last = name.rpartition(".")
    if not module:
        found = getattr(adamerge, name) if name in adamerge.__all__ else _subclasses(kind).get(name)
        if found is None:
            raise _no_class(key, name, kind, [*_subclasses(kind), *kinds_of(kind.__name__)])
        return found
    try:
        holder = importlib.import_module(module)
    except Exception as error:  # whatever a module does when it is imported
        raise ConfigError(f"{key}: there is no class '{name}': {error}", expected=such_as(kind)) from error
    if not hasattr(holder, last):
        of_kind = [one for one, value in vars(holder).items() if isinstance(value, type) and issubclass(value, kind)]
        raise _no_class(key, name, kind, [f"{module}.{one}" for one in {*of_kind, *getattr(holder, "__all__", ())}])
    return getattr(holder, last)


def such_as(kind: type) -> str:
    """Names what can stand where one of this class is asked for."""
    names = [name for name in kinds_of(kind.__name__) if name != kind.__name__]
    if not names:
        return f"a class derived from {full_name(kind)}"
    return f"{', '.join(names)}, or another {kind.__name__} by its full name"


def full_name(kind: type) -> str:
    """Returns module and name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _subclasses(kind: type) -> dict[str, type]:
    """The class and all that are derived from it so far, by their short names."""
    found: dict[str, type] = {}
    derived: list[type] = type.__subclasses__(kind)
    for one in derived:
        found |= _subclasses(one)
    return {**found, kind.__name__: kind}


def _no_class(key: str, name: str, kind: type, known: list[str]) -> ConfigError:
    near = difflib.get_close_matches(name, known, 1) or difflib.get_close_matches(
        name.lower(), [one.lower() for one in known], 1
    )
    near = [one for one in known if near and one.lower() == near[0].lower()]
    noun = NOUNS.get(kind.__name__, kind.__name__.lower())
    return ConfigError(
        f"{key}: there is no {noun} '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""),
        expected=None if near else such_as(kind),
    )
