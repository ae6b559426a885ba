"""What is wrong with a configuration, by the typed arguments of the classes that it names: the first fault, in one line."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adamerge.errors import ConfigError, nearest
from adamerge.runs.class_names import class_named, full_name, such_as
from adamerge.runs.help import elsewhere, near_key

WORDS: dict[Any, str] = {
    float: "number",
    int: "whole number",
    bool: "switch (true or false)",
    str: "text",
    Path: "path",
    list: "list, such as [a, b]",
    dict: "mapping, such as {a: 1}",
}
"""Names of the plain types in errors."""
GROUPS = ("model", "model.search", "data", "trainer")
"""Sections whose keys users may mistake for one another's."""


def fault(key: str, value: Any, hint: Any) -> ConfigError | None:
    """Returns what is wrong with a value; None where nothing is known to be.

    Args:
        key: of the value in the configuration, such as ``model.objective``.
        value: as YAML has it: a class is its name, or ``{class_path, init_args}``.
        hint: type of the argument that takes it.
    """
    options = _options(hint)
    faults = []
    for option in options:
        one = _fault_of_one(key, value, option)
        if one is None:
            return None
        faults.append((option, one))
    if not faults:
        return None
    # of alternatives, the one that a value of this form was meant for
    meant = [one for option, one in faults if _meant(value, option)]
    if meant:  # first one whose class the value names, and whose argument is wrong
        return next((one for one in meant if one.what.startswith(f"{key}.")), meant[0])
    literal = [option for option, _ in faults if _origin(option) is typing.Literal]
    choices = dict.fromkeys(str(choice) for option in literal for choice in typing.get_args(option))
    words = [_word(option) for option, _ in faults if option is not type(None) and option not in literal]
    what = [*(f"no {word}" for word in dict.fromkeys(words)), *([f"none of {', '.join(choices)}"] if choices else [])]
    wants_list = isinstance(value, str) and any(_origin(option) is list for option, _ in faults)
    return ConfigError(
        f"{key} is missing" if value is None else f"{key}: {value!r} is {' and '.join(what)}",
        todo=f"--{key}=[{value}]" if wants_list else None,
    )


def argument_fault(
    key: str, kind: Callable[..., Any], given: Mapping[str, Any], skipped: int = 0
) -> ConfigError | None:
    """Returns what is wrong with the arguments of a class; None where nothing is known to be.

    Args:
        key: of the class in the configuration.
        kind: the class.
        given: its arguments as YAML has them.
        skipped: so many arguments come first that a configuration does not give.
    """
    try:
        parameters = dict(list(inspect.signature(kind).parameters.items())[skipped:])
        hints = typing.get_type_hints(kind.__init__ if isinstance(kind, type) else kind)  # type: ignore[misc]
    except (TypeError, ValueError, NameError):
        return None
    open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    for name, value in given.items():
        if name not in parameters:
            if open_ended:
                continue
            return _no_argument(f"{key}.{name}", str(name), kind, list(parameters))
        default = _default(kind, parameters[name])
        preset = isinstance(default, type) and default.__module__ not in {"builtins", "inspect"}  # such as Adam
        if preset and isinstance(value, Mapping) and "class_path" not in value:
            value = {**value, "class_path": full_name(default)}
        error = fault(f"{key}.{name}", value, hints.get(name, Any))
        if error is not None:
            return error
    for name, one in parameters.items():
        if one.default is one.empty and name not in given and one.kind in {one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY}:
            return ConfigError(f"{key}.{name} is missing: {kind.__name__} needs it", todo=_help(key, kind))
    return None


def _default(kind: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    """Returns an argument's default; the factory of a field that has one."""
    fields = getattr(kind, "__dataclass_fields__", {})
    made = getattr(fields.get(parameter.name), "default_factory", dataclasses.MISSING)
    return parameter.default if made is dataclasses.MISSING else made


def _fault_of_one(key: str, value: Any, hint: Any) -> ConfigError | None:
    """Returns what is wrong with a value for one type, which is no union; None where nothing is known to be."""
    origin, kind = _origin(hint), _kind(hint)
    if hint is Any or origin is Any:
        return None
    wrong = ConfigError(f"{key}: {value!r} is no {_word(hint)}")
    if hint is type(None):
        return None if value is None else wrong
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        return None if value in choices else ConfigError(f"{key}: {value!r} is none of {list(choices)}")
    if kind is not None:
        return _class_fault(key, value, kind, hint)
    inner = typing.get_args(hint)
    if origin in {dict, list}:
        if not isinstance(value, Mapping if origin is dict else list):
            return wrong
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        keys = f"{key}.{{}}" if origin is dict else f"{key}[{{}}]"
        faults = (fault(keys.format(name), item, inner[-1]) for name, item in items) if inner else ()
        return next((one for one in faults if one is not None), None)
    if origin in {str, Path}:
        return wrong if isinstance(value, list | dict) or value is None else None
    if origin is bool:
        return None if isinstance(value, bool) else wrong
    if origin in {int, float}:
        return None if _is_number(value, origin) else wrong
    return None


def _class_fault(key: str, value: Any, kind: type, hint: Any) -> ConfigError | None:
    made_by = _origin(hint) is collections.abc.Callable
    if isinstance(value, str):
        value = {"class_path": value}
    if not isinstance(value, Mapping):
        what = f"{key} is missing" if value is None else f"{key}: {value!r} is no {kind.__name__}"
        return ConfigError(what, expected=such_as(kind))
    chosen: Any = kind
    if value.get("class_path") is not None:
        try:
            chosen = class_named(key, str(value["class_path"]), kind)
        except ConfigError as error:
            return error
        if not isinstance(chosen, type) and made_by and callable(chosen):
            return None
        if not (isinstance(chosen, type) and issubclass(chosen, kind)):
            return ConfigError(f"{key}: {value['class_path']} is no {kind.__name__}", expected=such_as(kind))
    if inspect.isabstract(chosen):
        return ConfigError(f"{key}: it is not said which {kind.__name__}", expected=such_as(kind))
    own = {name: item for name, item in value.items() if name not in {"class_path", "init_args", "dict_kwargs"}}
    skipped = len(typing.get_args(hint)[0]) if made_by else 0
    arguments = value.get("init_args") or {}
    if not isinstance(arguments, Mapping):
        return ConfigError(f"{key}.init_args: {arguments!r} is no {WORDS[dict]}")
    return argument_fault(key, chosen, {**arguments, **own}, skipped)


def _word(hint: Any) -> str:
    kind = _kind(hint)
    return WORDS.get(_origin(hint)) or (kind.__name__ if kind is not None else str(hint))


def _options(hint: Any) -> list[Any]:
    if _origin(hint) in {typing.Union, types.UnionType}:
        return [one for option in typing.get_args(hint) for one in _options(option)]
    return [hint]


def _origin(hint: Any) -> Any:
    origin = typing.get_origin(hint) or hint
    plain = {collections.abc.Mapping: dict, collections.abc.Sequence: list, collections.abc.Iterable: list, tuple: list}
    return plain.get(origin, origin)


def _kind(hint: Any) -> type | None:
    """Returns the class that a configuration names for a type; None for plain types."""
    if _origin(hint) is collections.abc.Callable:
        made = typing.get_args(hint)
        return _kind(made[1]) if len(made) == 2 else None
    plain = hint in WORDS or hint is type(None) or typing.get_origin(hint) is not None
    return (
        hint
        if isinstance(hint, type) and not plain and hint.__module__ not in {"builtins", "typing", "datetime"}
        else None
    )


def _meant(value: Any, option: Any) -> bool:
    if isinstance(value, list):
        return _origin(option) is list
    if isinstance(value, Mapping):
        return (
            _kind(option) is not None if "class_path" in value else _kind(option) is not None or _origin(option) is dict
        )
    return isinstance(value, str) and (_kind(option) is not None or _origin(option) is typing.Literal)


def _is_number(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        kind(str(value))  # YAML's 1e-3 is a text, for want of a point; and a whole number has none
    except ValueError:
        return False
    return True


def _help(key: str, kind: Callable[..., Any]) -> str:
    """Returns the command that shows the arguments of a class."""
    if key in {"model", "trainer"}:
        return "adamerge fit --help" if key == "model" else "adamerge fit --trainer.help"
    own = kind.__module__.startswith("adamerge.")
    return f"adamerge fit --{key}.help={kind.__name__ if own else f'{kind.__module__}.{kind.__qualname__}'}"


def _no_argument(full: str, name: str, kind: Callable[..., Any], known: list[str]) -> ConfigError:
    near, group = nearest(name, known), full.rpartition(".")[0]
    meant = f"{group}.{near}" if near else elsewhere(name)
    if meant is None and group in GROUPS:
        meant = near_key(full)
    return ConfigError(
        f"{full} is no argument of {kind.__name__}" + (f"; did you mean '{meant}'?" if meant else ""),
        expected=None if meant else f"one of {', '.join(known)}" if known else "none: it takes no arguments",
        todo=None if meant else _help(group, kind),
    )
