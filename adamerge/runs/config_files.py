"""Configuration files: YAML read with one value a key and today's names; the files of a method of stages."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import yaml

import adamerge
from adamerge.errors import ConfigError, nearest
from adamerge.io.public_names import PREFIX, private_names, renewed
from adamerge.io.run_folder import resolved, run_of
from adamerge.io.versions import refuse_later, version_of


class OneOfEach(yaml.SafeLoader):
    """YAML loader that refuses a mapping with a key twice, of which the last would win silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Returns the mapping of a YAML node.

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
    """Returns a file's content with today's names of parts, and the paths inside its run where that is now.

    Its keys are not checked yet.

    Raises:
        ConfigError: there is no such file, it holds no mapping, one of its mappings holds a key twice, or a later version of
            the program wrote it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        refuse_later(version_of(text), path, ConfigError)
        content = _loaded(text)
    except FileNotFoundError as error:
        raise ConfigError(f"no such configuration file: {path}", todo=_near_file(path)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        what = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        raise ConfigError(f"{path}: not valid YAML: {position}{what}") from error
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
        here = partial(resolved, run=run_of(path))
        content = {key: with_texts(renewed(value), here) for key, value in content.items()}
    except RecursionError as error:
        raise ConfigError(f"{path}: a value contains itself, or nests too deeply") from error
    refuse_private(content, f"{path}: ")
    return content


@lru_cache(maxsize=64)
def _loaded(text: str) -> Any:
    """Returns what YAML holds, which nobody may change: a verb reads each of its files several times."""
    return yaml.load(text, OneOfEach)  # a SafeLoader


def refuse_private(content: Any, where: str = "") -> None:
    """Refuses private names of the package's parts, which a later version could not read.

    Args:
        content: a configuration.
        where: file that it comes from, with a colon, for the error.

    Raises:
        ConfigError: a part is named by something else than its public name.
    """
    for name in private_names(content):
        last = name.rpartition(".")[2]
        near = nearest(last, adamerge.__all__)
        raise ConfigError(
            f"{where}adamerge has no part '{name}'",
            todo=f"name it {PREFIX}{last}"
            if last == near
            else f"did you mean '{PREFIX}{near}'?"
            if near
            else "only its public names can be given",
        )


def with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Returns plain data with all of its texts changed, but for the keys of its mappings."""
    if isinstance(value, dict):
        return {key: with_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [with_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _near_file(path: Path) -> str | None:
    """Returns a question that proposes a file of that folder with a similar name; None where there is none."""
    there = [one.name for one in path.parent.glob("*")] if path.parent.is_dir() else []
    near = nearest(path.name, there)
    return f"did you mean {path.parent / near}?" if near else None


def stages_of(folder: Path) -> list[Path]:
    """Returns the files of the stages of a method that is a folder, in order.

    Raises:
        ConfigError: its YAML files are not ``1_*.yaml, 2_*.yaml, ...``.
    """
    files = {path.name: path for path in folder.glob("*.yaml")}
    by_number = {int(given[1]): files[name] for name in files if (given := re.match(r"(\d+)_", name))}
    if not files or len(by_number) < len(files) or sorted(by_number) != list(range(1, len(files) + 1)):
        raise ConfigError(
            f"{folder} is not a method of stages",
            expected="1_NAME.yaml, 2_NAME.yaml and so on, and no other YAML file",
            got=sorted(files),
        )
    return [by_number[number] for number in sorted(by_number)]
