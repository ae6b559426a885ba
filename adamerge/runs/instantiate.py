"""Parts from a configuration read as data: transforms, parametrization and storage are made, nothing else is imported."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from adamerge.errors import ConfigError
from adamerge.io.public_names import current_name
from adamerge.merging.copies import Copy
from adamerge.objectives.penalties import Penalty
from adamerge.parametrizations import Mask, Parametrization
from adamerge.parametrizations.constraints import Constraint
from adamerge.task_vectors.storage import Storage
from adamerge.transforms import Transform

PARTS = (Transform, Parametrization, Constraint, Mask, Penalty, Storage, Copy)
"""What can be an argument of a part."""


def make_part(spec: Any, kind: type | tuple[type, ...], key: str) -> Any:
    """The part that ``{"class_path", "init_args"}`` or a class's name describes.

    Args:
        spec: as written in YAML.
        kind: it must be one; a parametrization is given as what still waits for its task vectors.
        key: of the configuration, for errors.

    Raises:
        ConfigError: there is no such class, it is no ``kind``, or does not take these arguments.
    """
    if isinstance(spec, str):
        spec = {"class_path": spec}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("class_path"), str):
        raise ConfigError(f"{key}: no part is described", expected="{class_path: ..., init_args: {...}}", got=spec)
    found = find_class(spec["class_path"], key)
    if not issubclass(found, kind):
        what = "part" if isinstance(kind, tuple) else kind.__name__
        raise ConfigError(f"{key}: {spec['class_path']} is not a {what}")
    return _made(found, spec.get("init_args") or {}, key)


def find_class(path: str, key: str) -> type:
    """A class by its full name, today's or a former one, or by its own where ``adamerge`` offers it.

    Raises:
        ConfigError: there is none.
    """
    module, _, name = current_name(path).rpartition(".")
    try:
        found = getattr(importlib.import_module(module or "adamerge"), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}: there is no class {path}: {error}") from error
    if not isinstance(found, type):
        raise ConfigError(f"{key}: {path} is not a class", got=type(found).__name__)
    return found


def _made(found: type, arguments: Mapping[str, Any], key: str) -> Any:
    known = {name: p for name, p in inspect.signature(found).parameters.items() if name != "task_vectors"}
    unknown = [name for name in arguments if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        raise ConfigError(
            f"{key}: {found.__name__} has no argument '{unknown[0]}'",
            expected=f"of {list(known)}",
            got=unknown[0],
            todo=f"did you mean '{near[0]}'?" if near else None,
        )
    missing = [name for name, p in known.items() if p.default is p.empty and name not in arguments]
    if missing:
        raise ConfigError(f"{key}: {found.__name__} needs '{missing[0]}'", expected=missing, got=list(arguments))
    given = {
        name: _number(_nested(value, f"{key}.{name}"), str(known[name].annotation)) for name, value in arguments.items()
    }
    if issubclass(found, Parametrization):
        return partial(_called, found, given, key)
    return _called(found, given, key)


def _called(found: Callable[..., Any], arguments: Mapping[str, Any], key: str, *positional: Any) -> Any:
    try:
        return found(*positional, **arguments)
    except (TypeError, AttributeError, OSError) as error:  # a text where a number belongs, a file that is not there yet
        name = getattr(found, "__name__", str(found))
        raise ConfigError(f"{key}: {name} does not take {dict(arguments)}: {error}") from error


def _nested(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        if "class_path" in value:
            return make_part(value, PARTS, key)
        return {name: _nested(item, key) for name, item in value.items()}
    return [_nested(item, key) for item in value] if isinstance(value, list) else value


def _number(value: Any, annotation: str) -> Any:
    """YAML's ``1e-3`` is a text, for want of a point."""
    if isinstance(value, str) and "float" in annotation:
        try:
            return float(value)
        except ValueError:
            return value
    return value
