"""Words of a command line told apart: files, overrides, and what asks for a text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adamerge.errors import ConfigError


@dataclass
class Words:
    """A command line, divided into files, overrides and flags.

    Attributes:
        files: configurations, with ``--config`` or without it, in order.
        overrides: ``--key=value``, each one word.
        flags: what asks for a text instead of a fit, such as ``--help`` and ``--model.objective.help=Entropy``.
    """

    files: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)

    @property
    def in_order(self) -> list[str]:
        """All words as one list: files, each with its ``--config``, then overrides, then flags."""
        return [*(f"--config={file}" for file in self.files), *self.overrides, *self.flags]

    @property
    def folders(self) -> list[Path]:
        """Those of the files that are folders, which hold the stages of a method."""
        return [Path(file) for file in self.files if Path(file).is_dir()]

    def of_stage(self, number: int) -> list[str]:
        """Returns the overrides of one stage, its own last; only those for all stages where ``number`` is 0."""
        common = [word for word in self.overrides if stage_of(word) is None]
        own = [re.sub(r"^--\d+\.", "--", word) for word in self.overrides if number and stage_of(word) == number]
        return [*common, *own]


def stage_of(word: str) -> int | None:
    """Returns the number of the stage that an override such as ``--2.key=value`` is for; None where it is for all."""
    given = re.match(r"--(\d+)\.", word)
    return int(given[1]) if given else None


def words_of_fits(pool: Path, methods: Sequence[Path], shared: Words) -> dict[Path, Words]:
    """Returns the words of a fit of each method on one pool; overrides of single stages are for methods that have stages."""
    staged = any(method.is_dir() for method in methods)
    overrides = {
        method: shared.overrides if method.is_dir() or not staged else shared.of_stage(0) for method in methods
    }
    return {method: Words([str(pool), str(method), *shared.files], own) for method, own in overrides.items()}


def told_apart(words: Sequence[str]) -> Words:
    """Tells files, overrides and flags of a command line apart.

    Raises:
        ConfigError: a word is none of them, or lacks its value.
    """
    parts, rest = Words(), list(words)
    while rest:
        word = rest.pop(0)
        name, has_value, _ = word.partition("=")
        if word in {"--config", "-c"}:
            parts.files.append(_value_of(word, rest))
        elif name == "--config":
            parts.files.append(word.partition("=")[2])
        elif name in {"-h", "--help", "--print_config"}:
            parts.flags.append(word)
        elif name.startswith("--") and name.endswith(".help"):
            given = not has_value and rest and not rest[0].startswith("-")
            parts.flags.append(f"{word}={rest.pop(0)}" if given else word)
        elif name.startswith("--"):
            parts.overrides.append(word if has_value else f"{word}={_value_of(word, rest)}")
        elif word.startswith("-"):
            raise ConfigError(f"there is no option {word}", todo="keys have two dashes: --key=value")
        elif has_value and re.fullmatch(r"[\w.]+\+?", name) and not Path(word).exists():
            raise ConfigError(f"'{word}' has no dashes; did you mean --{word}?")
        else:
            parts.files.append(word)
    return parts


def _value_of(word: str, rest: list[str]) -> str:
    if not rest or rest[0].startswith("--"):
        raise ConfigError(f"{word} has no value", todo=f"{word}=VALUE")
    return rest.pop(0)
