"""Layers: configurations as plain data, laid over each other, and the words of a command line on top."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from adamerge.errors import ConfigError
from adamerge.io.public_names import PREFIX, current_name, find, renewed
from adamerge.io.unwritten import IMPORTANCE, PREVIOUS, RUN
from adamerge.runs.class_descriptions import described

OWN = ("class_path", "init_args", "dict_kwargs")
"""Keys of a class in a configuration; its arguments may also stand beside them."""


def overlaid(below: Any, above: Any) -> Any:
    """Returns one value laid over another: mappings key by key, everything else replaced.

    A class that replaces another keeps those of its arguments that it has too. Arguments without a class are those of
    whatever class there is, below or above.
    """
    if isinstance(above, str) and isinstance(below, dict) and "class_path" in below:
        above = {"class_path": above}
    if isinstance(below, str) and isinstance(above, dict) and "class_path" not in above and _is_class(below):
        below = {"class_path": below}
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if "class_path" not in below and "class_path" not in above:
        return {**below, **{key: overlaid(below.get(key), value) for key, value in above.items()}}
    lower, upper = _as_class(below), _as_class(above)
    arguments = lower.get("init_args") or {}
    if "class_path" in lower and "class_path" in upper and not _same(lower["class_path"], upper["class_path"]):
        taken = _arguments_of(str(upper["class_path"]))
        arguments = {key: value for key, value in arguments.items() if key in taken}
    both = (arguments, upper.get("init_args") or {})
    # what a method sets of whatever class the pool has counts, whichever comes first
    first, last = both if "class_path" in lower else both[::-1]
    merged = {**lower, **upper}
    if first or last or "init_args" in merged:
        merged["init_args"] = overlaid(first, last)
    return merged


def as_text(text: str) -> Any:
    """Returns the value of an override for the parser: numbers and switches as written, since a text may look like one."""
    value = as_yaml(text)
    return value if value is None or isinstance(value, str | list | dict) else text


def as_yaml(text: str) -> Any:
    """Returns the value of an override as YAML has it, with today's names of classes."""
    if text in {PREVIOUS, IMPORTANCE, RUN}:  # a mapping to YAML
        return text
    try:
        return renewed(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError):
        return text


def overridden(config: Mapping[str, Any], words: Sequence[str], read: Callable[[str], Any] = as_yaml) -> dict[str, Any]:
    """Returns a configuration with ``--key=value`` laid over it; ``--key+=value`` adds to a list.

    Args:
        config: as plain data.
        words: each with its value.
        read: makes the value of its text.

    Raises:
        ConfigError: a word is no override, or a key leads into what has none.
    """
    result = dict(config)
    for word in words:
        if not word.startswith("--") or "=" not in word:
            raise ConfigError(f"not an override: {word}", expected="--key=value", got=word)
        key, _, text = word[2:].partition("=")
        parts, value = key.rstrip("+").split("."), read(text)
        if key.endswith("+"):
            value = [*(_at(result, parts) or []), *(value if isinstance(value, list) else [value])]
        result = overlaid(result, nested(result, parts, value, key))
    return result


def nested(there: Any, parts: Sequence[str], value: Any, key: str) -> Any:
    """Returns ``{"a": {"b": value}}`` for ``a.b``, by way of ``init_args`` where a class is configured.

    Raises:
        ConfigError: what is there has nothing below it.
    """
    if not parts:
        return value
    if isinstance(there, str) and _is_class(there):
        there = {"class_path": there}
    if there is not None and not isinstance(there, dict):
        raise ConfigError(f"--{key}: there is nothing below to set", got=there)
    own = there or {}
    if "class_path" in own and parts[0] not in OWN:
        return {"init_args": nested(own.get("init_args"), parts, value, key)}
    return {parts[0]: nested(own.get(parts[0]), parts[1:], value, key)}


def _at(config: Any, parts: Sequence[str]) -> Any:
    for part in parts:
        if isinstance(config, dict) and "class_path" in config and part not in OWN:
            config = config.get("init_args")
        config = config.get(part) if isinstance(config, dict) else None
    return config


def _as_class(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a class, or arguments of one, with all arguments below ``init_args``."""
    flat = {key: item for key, item in value.items() if key not in OWN}
    own = {key: item for key, item in value.items() if key in OWN}
    return {**own, "init_args": {**(own.get("init_args") or {}), **flat}} if flat else own


def _is_class(text: str) -> bool:
    """Returns whether a text is written as a class's name is."""
    return re.fullmatch(r"(\w+\.)*[A-Z]\w*", text) is not None


def _same(one: Any, other: Any) -> bool:
    return current_name(str(one)).removeprefix(PREFIX) == current_name(str(other)).removeprefix(PREFIX)


def _arguments_of(name: str) -> set[str]:
    """Returns the names of a class's arguments; none where there is no such class, which another check reports."""
    about = described(current_name(name))
    if about is not None:
        return {one.name for one in about.arguments}
    try:
        return set(inspect.signature(find(name)).parameters)
    except (LookupError, TypeError, ValueError):
        return set()
