"""Configurations as data: YAML files laid over each other and overrides on top, without making what they name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import adamerge
from adamerge.errors import ConfigError
from adamerge.io.public_names import PREFIX, private_names, renewed
from adamerge.io.versions import refuse_later, version_of

NO_DATA = "adamerge.NoData"


class OneOfEach(yaml.SafeLoader):
    """YAML in which a mapping has each key once: of two, the last would win and nobody know."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping.

        Raises:
            MarkedYAMLError: a key is there twice.
        """
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                line = key.start_mark.line + 1
                if key.value in lines:
                    what = f"'{key.value}' is there twice, in lines {lines[key.value]} and {line}"
                    raise yaml.MarkedYAMLError(problem=what, problem_mark=key.start_mark)
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def read_config(path: Path) -> dict[str, Any]:
    """A file's content with today's names of parts, before its keys are looked at.

    Raises:
        ConfigError: there is no such file, it holds no mapping, one of its mappings holds a key twice, or a later version of
            the program wrote it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        refuse_later(version_of(text), path, ConfigError)
        content = yaml.load(text, OneOfEach)  # a SafeLoader
    except FileNotFoundError as error:
        raise ConfigError(f"no such configuration file: {path}", todo=_near_file(path)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        what = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        raise ConfigError(f"{path}: not valid YAML: {place}{what}") from error
    except (
        yaml.YAMLError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:  # a date that is none, a tag that does not fit
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: is empty or no mapping", expected="keys such as model, data, trainer", got=type(content).__name__
        )
    try:
        found = {key: renewed(value) for key, value in content.items()}
    except RecursionError as error:
        raise ConfigError(f"{path}: a value contains itself, or nests too deeply") from error
    _check_names(path, found)
    return found


def _check_names(path: Path, content: Any) -> None:
    """Of the package itself nothing but its public names is looked up."""
    for name in private_names(content):
        near = difflib.get_close_matches(name.rpartition(".")[2], adamerge.__all__, 1)
        raise ConfigError(
            f"{path}: adamerge has no part '{name}'", todo=f"did you mean '{PREFIX}{near[0]}'?" if near else None
        )


def _near_file(path: Path) -> str | None:
    """Another file of that folder whose name is near."""
    there = [one.name for one in path.parent.glob("*")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, there, 1)
    return f"did you mean {path.parent / near[0]}?" if near else None


def config_files(arguments: Sequence[str]) -> list[str]:
    """The files given with ``--config``, in order."""
    found = []
    for i, word in enumerate(arguments):
        if word in {"--config", "-c"} and i + 1 < len(arguments):
            found.append(arguments[i + 1])
        elif word.startswith("--config="):
            found.append(word.partition("=")[2])
    return found


def data_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with the files that set an argument of whatever data the pool has behind the pool's own.

    ``--data=null``, or null in a file, stands for no data.
    """
    found, files = list(arguments), config_files(arguments)
    later = [path for path in files if _adjusts_data(Path(path))]
    order = iter([*(path for path in files if path not in later), *later])
    for i, word in enumerate(found):
        if word.startswith("--config="):
            found[i] = f"--config={next(order)}"
        elif word in {"--config", "-c"} and i + 1 < len(found):
            found[i + 1] = next(order)
    with_none = []
    for before, word in zip(["", *found], found, strict=False):
        is_null = word in {"--data=null", "--data=None"} or (before == "--data" and word in {"null", "None"})
        with_none.append(f"{'' if before == '--data' else '--data='}{NO_DATA}" if is_null else word)
        if before in {"--config", "-c"} or word.startswith("--config="):
            content = read_config(Path(word.removeprefix("--config=")))
            with_none += [f"--data={NO_DATA}"] if "data" in content and content["data"] is None else []
    return with_none


def stages_of(folder: Path) -> list[Path]:
    """The stages of a method that is a folder, in order.

    Raises:
        ConfigError: its YAML files are not ``1_*.yaml, 2_*.yaml, ...``.
    """
    files = {path.name: path for path in folder.glob("*.yaml")}
    by_number = {int(found[1]): files[name] for name in files if (found := re.match(r"(\d+)_", name))}
    if not files or len(by_number) < len(files) or sorted(by_number) != list(range(1, len(files) + 1)):
        raise ConfigError(
            f"{folder} is not a method of stages",
            expected="1_NAME.yaml, 2_NAME.yaml and so on, and no other YAML file",
            got=sorted(files),
        )
    return [by_number[number] for number in sorted(by_number)]


def overlaid(below: Any, above: Any) -> Any:
    """Mappings key by key, everything else replaced; another class takes none of the arguments of the one before."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    if "class_path" in above and "class_path" in below and above["class_path"] != below["class_path"]:
        return above
    return {**below, **{key: overlaid(below.get(key), value) for key, value in above.items()}}


def overridden(config: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """A configuration with ``--key=value`` or ``--key value`` laid over it.

    Raises:
        ConfigError: a word is no override, or a key leads into what has none.
    """
    found = dict(config)
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--") or ("=" not in word and not remaining):
            raise ConfigError(f"not an override: {word}", expected="--key=value", got=word)
        key, _, text = word[2:].partition("=")
        value = text if "=" in word else remaining.pop(0)
        found = overlaid(found, _nested(found, key.split("."), _parsed(value), key))
    return found


def _adjusts_data(path: Path) -> bool:
    data = yaml.safe_load(path.read_text(encoding="utf-8")).get("data")
    return isinstance(data, dict) and "class_path" not in data


def _parsed(text: str) -> Any:
    try:
        return renewed(yaml.safe_load(text))
    except yaml.YAMLError:
        return text


def _nested(there: Any, parts: Sequence[str], value: Any, key: str) -> Any:
    """``{"a": {"b": value}}`` for ``a.b``, by way of ``init_args`` where a class is configured."""
    if not parts:
        is_class = isinstance(there, dict) and "class_path" in there and isinstance(value, str)
        return {"class_path": value} if is_class else value
    if isinstance(there, str):  # a class by its name alone
        return {"class_path": there, "init_args": {parts[0]: _nested(None, parts[1:], value, key)}}
    if there is not None and not isinstance(there, dict):
        raise ConfigError(f"--{key}: there is nothing below to set", got=there)
    own = there or {}
    if "class_path" in own and parts[0] not in {"class_path", "init_args"}:
        return {"init_args": _nested(own.get("init_args"), parts, value, key)}
    return {parts[0]: _nested(own.get(parts[0]), parts[1:], value, key)}
