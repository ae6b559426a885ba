"""Recipes: transforms, parametrization and constraint as plain data, and back; nothing but such parts can be built."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adamerge.errors import CoefficientsError, ConfigError
from adamerge.io.public_names import PREFIX, current_name, find, public_name
from adamerge.parametrizations import Mask, Parametrization
from adamerge.parametrizations.constraints import Constraint, Softmax
from adamerge.transforms import Transform

PARTS = (Constraint, Mask, Parametrization, Transform)


def describe(part: Any) -> Any:
    """Returns a part as plain data, ``{"class_path", "init_args"}``: its constructor's arguments are its attributes."""
    if isinstance(part, str | int | float | bool | None):
        return part
    if isinstance(part, list | tuple):
        return [describe(item) for item in part]
    if isinstance(part, Mapping):
        return {str(key): describe(value) for key, value in part.items()}
    if isinstance(part, functools.partial):
        return {"class_path": public_name(part.func), "init_args": {k: describe(v) for k, v in part.keywords.items()}}
    names = [name for name in inspect.signature(type(part)).parameters if name != "task_vectors"]
    return {
        "class_path": public_name(type(part)),
        "init_args": {name: describe(getattr(part, name)) for name in names},
    }


def plain_data(part: Any, cannot: str, otherwise: str = ": a number, text, list or another part") -> Any:
    """Returns what ``describe`` does, if it is plain data.

    Args:
        part: which.
        cannot: what cannot be done with a part that is none, as errors say it.
        otherwise: ends the advice to keep each constructor argument as an attribute.

    Raises:
        ConfigError: a constructor argument is no attribute of the same name, or not plain data.
    """
    try:
        spec = describe(part)
        json.dumps(spec)
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{type(part).__name__} cannot be {cannot}: {error}",
            todo=f"keep each constructor argument as an attribute of its name{otherwise}",
        ) from error
    return spec


def build(spec: Any, kind: type, plugins: Sequence[str] = ()) -> Any:
    """Returns the part that ``describe`` described.

    Raises:
        CoefficientsError: its class is not a ``kind``, or neither public in ``adamerge`` nor of an allowed prefix.
    """
    return build_factory(spec, kind, plugins)()


def build_factory(spec: Any, kind: type, plugins: Sequence[str] = ()) -> Callable[..., Any]:
    """Returns the part that ``describe`` described, as a factory that still waits for task vectors."""
    try:
        class_path, init_args = current_name(spec["class_path"]), dict(spec["init_args"])
        module, _, name = class_path.rpartition(".")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CoefficientsError(f"the recipe holds {spec!r:.200}, which describes no part") from error
    named = _named(module, name, plugins)
    if not (isinstance(named, type) and issubclass(named, kind)):
        raise CoefficientsError(f"the recipe names '{class_path}', which is not a {kind.__name__}")
    arguments = {}
    for key, value in init_args.items():
        nested = isinstance(value, dict) and value.keys() == {"class_path", "init_args"}
        arguments[key] = _nested(value, plugins) if nested else value
    if isinstance(arguments.get("constraint"), Softmax):
        arguments["init"] = None  # files of 0.1 hold what was asked for; it never started elsewhere
    return functools.partial(named, **arguments)


def _nested(spec: Any, plugins: Sequence[str]) -> Any:
    """Returns a part inside a part: another parametrization stays a factory, everything else is built."""
    factory = build_factory(spec, object, plugins)
    kind = factory.func  # type: ignore[attr-defined]
    if not issubclass(kind, PARTS):
        raise CoefficientsError(f"the recipe names '{spec['class_path']}', which is not a part of a recipe")
    return factory if issubclass(kind, Parametrization) else factory()


def _named(module: str, name: str, plugins: Sequence[str]) -> Any:
    """Returns what a path names: of ``adamerge`` its public names alone, whatever the plugins; of others what they allow."""
    path = f"{module}.{name}"
    try:
        if path.startswith((PREFIX, *(f"{prefix.rstrip('.')}." for prefix in plugins))):
            return find(path)
    except LookupError as error:
        raise CoefficientsError(f"the recipe names '{path}', which does not exist: {error}") from error
    raise CoefficientsError(
        f"the recipe names '{path}', which is not part of adamerge",
        todo=f"if you trust it, pass --allow-plugins {module.split('.')[0]}",
    )
