"""Classes by their names in a configuration, full or short; where there is none, the one that was probably meant."""

from __future__ import annotations

import sys
from typing import Any

import adamerge
from adamerge.errors import ConfigError, nearest
from adamerge.io.public_names import PREFIX, find
from adamerge.runs.class_descriptions import kinds_of

NOUNS = {"Calibration": "data class", "Teachers": "kind of teachers"}
"""Names of classes to nouns that errors use for them, where the name itself would not do."""


def class_named(key: str, name: str, kind: type) -> Any:
    """Returns the class or function that a full or a short name stands for.

    Args:
        key: of the configuration, for errors.
        name: as configured.
        kind: what can stand there.

    Raises:
        ConfigError: there is nothing of that name.
    """
    if not name.rpartition(".")[0]:
        known = _subclasses(kind)
        if name in adamerge.HOMES:
            return find(f"{PREFIX}{name}")
        if name in known:
            return known[name]
        raise _no_class(key, name, kind, [*known, *kinds_of(kind.__name__)])
    try:
        return find(name)
    except LookupError as error:
        module = sys.modules.get(name.rpartition(".")[0])
        if name.startswith(PREFIX) or module is not None:
            own = [f"{PREFIX}{one}" for one in kinds_of(kind.__name__)]
            others = [f"{module.__name__}.{one}" for one in _of_kind(module, kind)] if module is not None else []
            raise _no_class(key, name, kind, own if name.startswith(PREFIX) else others) from error
        raise ConfigError(f"{key}: there is no class '{name}': {error}", expected=such_as(kind)) from error


def such_as(kind: type) -> str:
    """Returns a text that lists the classes to choose from where one derived from ``kind`` is asked for."""
    names = [name for name in kinds_of(kind.__name__) if name != kind.__name__]
    if not names:
        return f"a class derived from {full_name(kind)}"
    return f"{', '.join(names)}, or another {kind.__name__} by its full name"


def full_name(kind: type) -> str:
    """Returns a class's module and qualified name, joined by a dot."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _of_kind(module: Any, kind: type) -> list[str]:
    own = {one for one, value in vars(module).items() if isinstance(value, type) and issubclass(value, kind)}
    return sorted({*own, *getattr(module, "__all__", ())})


def _subclasses(kind: type) -> dict[str, type]:
    """Returns a class and all classes derived from it so far, by their short names."""
    known: dict[str, type] = {}
    derived: list[type] = type.__subclasses__(kind)
    for one in derived:
        known |= _subclasses(one)
    return {**known, kind.__name__: kind}


def _no_class(key: str, name: str, kind: type, known: list[str]) -> ConfigError:
    # the beginning of a full name is right, and would make all of them near
    last = nearest(name.rpartition(".")[2], [one.rpartition(".")[2] for one in known])
    near = next((one for one in known if last is not None and one.rpartition(".")[2] == last), None)
    noun = NOUNS.get(kind.__name__, kind.__name__.lower())
    return ConfigError(
        f"{key}: there is no {noun} '{name}'" + (f"; did you mean '{near}'?" if near else ""),
        expected=None if near else such_as(kind),
    )
