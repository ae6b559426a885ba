"""Words of a command line told apart, and what can be known to be wrong with them before any library is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adamerge.errors import ConfigError
from adamerge.runs.config_files import overlaid, overridden, read_config, stages_of
from adamerge.runs.help import near_key

TOP = ("model", "data", "trainer", "tasks", "leave_out", "runs", "name", "id", "seed_everything")
"""First parts of every key that a configuration may have."""


@dataclass
class Words:
    """A command line in parts.

    Attributes:
        files: configurations, with ``--config`` or without it, in order.
        overrides: ``--key=value``, each one word.
        flags: what asks for a text instead of a fit, such as ``--help`` and ``--model.objective.help=Entropy``.
    """

    files: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)

    @property
    def for_parser(self) -> list[str]:
        """The same words, every file with its ``--config``."""
        return [*(f"--config={file}" for file in self.files), *self.overrides, *self.flags]

    def without_stages(self) -> list[str]:
        """The overrides that are not for one stage alone."""
        return [word for word in self.overrides if _stage(word) is None]


def told_apart(words: Sequence[str]) -> Words:
    """Tells files, overrides and flags of a command line apart.

    Raises:
        ConfigError: a word is none of them, or lacks its value.
    """
    found, rest = Words(), list(words)
    while rest:
        word = rest.pop(0)
        name, has_value, _ = word.partition("=")
        if word in {"--config", "-c"}:
            found.files.append(_value_of(word, rest))
        elif name == "--config":
            found.files.append(word.partition("=")[2])
        elif name in {"-h", "--help", "--print_config"}:
            found.flags.append(word)
        elif name.startswith("--") and name.endswith(".help"):
            given = not has_value and rest and not rest[0].startswith("-")
            found.flags.append(f"{word}={rest.pop(0)}" if given else word)
        elif name.startswith("--"):
            found.overrides.append(word if has_value else f"{word}={_value_of(word, rest)}")
        elif word.startswith("-"):
            raise ConfigError(f"there is no option {word}", todo="keys have two dashes: --key=value")
        elif has_value and re.fullmatch(r"[\w.]+\+?", name) and not Path(word).exists():
            raise ConfigError(f"'{word}' has no dashes; did you mean --{word}?")
        else:
            found.files.append(word)
    return found


def refuse_early(words: Words, verb: str) -> None:
    """Refuses what the words and the files that they name show to be wrong; loads no library.

    Args:
        words: of the command line.
        verb: of which; for what is said.

    Raises:
        ConfigError: a file cannot be read, a key has an unknown beginning, a stage is not there, or base, experts or method
            are in none of the files.
    """
    stages = _stages(words.files)
    files = [file for name in words.files for file in (stages if Path(name).is_dir() else [Path(name)])]
    contents = {file: read_config(file) for file in files}
    for file, content in contents.items():
        for key in content:
            if key not in TOP:
                raise unknown_key(str(key), f"{file}: '{key}'")
    for word in words.overrides:
        number, key = _stage(word), re.sub(r"^--(\d+\.)?", "", word).partition("=")[0].rstrip("+")
        if number is not None and not 1 <= number <= len(stages):
            raise ConfigError(
                f"--{number}.{key}: there is no stage {number} to override",
                expected=f"1 to {len(stages)}" if stages else "a method that is a folder of stages",
                got=number,
                todo=None if stages else f"--{key} is for a method that is a file",
            )
        if key.partition(".")[0] not in TOP:
            raise unknown_key(key, f"--{key}")
    if words.flags:
        return
    config: dict[str, Any] = {}
    for file, content in contents.items():
        if file not in stages[1:]:
            config = overlaid(config, content)
    first = [re.sub(r"^--1\.", "--", word) for word in words.overrides if _stage(word) in {None, 1}]
    _require(overridden(config, [word for word in first if "+=" not in word]), words.files, verb)


def _value_of(word: str, rest: list[str]) -> str:
    if not rest or rest[0].startswith("--"):
        raise ConfigError(f"{word} has no value", todo=f"{word}=VALUE")
    return rest.pop(0)


def _stage(word: str) -> int | None:
    """The number of ``--2.key=value``; None where there is none."""
    given = re.match(r"--(\d+)\.", word)
    return int(given[1]) if given else None


def _stages(files: Sequence[str]) -> list[Path]:
    folders = [Path(file) for file in files if Path(file).is_dir()]
    if len(folders) > 1:
        raise ConfigError(f"at most one folder of stages, got {[str(folder) for folder in folders]}")
    return stages_of(folders[0]) if folders else []


def unknown_key(key: str, where: str) -> ConfigError:
    """The error of a key that a configuration does not have.

    Args:
        key: which.
        where: it stands.
    """
    near = near_key(key)
    return ConfigError(
        f"{where} is no key" + (f"; did you mean '{near}'?" if near else ""),
        expected=None if near else f"one of {', '.join(TOP)}, or what is below them",
        todo=None if near else "adamerge fit --help lists the keys",
    )


def _require(config: dict[str, Any], files: Sequence[str], verb: str) -> None:
    model = config.get("model")
    for key in ("task_vectors", "parametrization"):
        if isinstance(model, str):  # a file of its own, which the parser reads
            return
        if not isinstance(model, dict) or not model.get(key):
            raise ConfigError(
                f"model.{key} is in none of {list(files)}",
                todo=f"give a pool (what is merged) and a method (how): adamerge {verb} POOL METHOD",
            )
