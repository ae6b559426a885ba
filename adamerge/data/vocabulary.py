"""Vocabularies: class names and prompt templates of public image tasks, in the order of their labels, kept as data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

from adamerge.errors import ConfigError, nearest

_FOLDER = files("adamerge.data") / "vocabularies"


@dataclass(frozen=True)
class Vocabulary:
    """The class names and templates of which a zero-shot head is made.

    Args:
        classnames: in label order.
        templates: prompts with ``{}`` where the class name goes.
        as_trained: the names are in the order of the rows that experts were tuned with, whatever classes the labels name.
    """

    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    as_trained: bool = False


def vocabularies() -> list[str]:
    """Returns the names that ``load_vocabulary`` knows: files of ``adamerge/data/vocabularies``, each with its sources."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _FOLDER.iterdir() if entry.name.endswith(".yaml"))


@cache
def load_vocabulary(name: str) -> Vocabulary:
    """Returns class names and templates of a public task.

    Raises:
        ConfigError: there is none of this name.
    """
    known = vocabularies()
    if name not in known:
        near = nearest(name, known)
        raise ConfigError(
            f"there is no vocabulary '{name}'",
            expected=f"one of {known}",
            todo=f"did you mean '{near}'?" if near else "list classnames and templates in the configuration",
        )
    content = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return Vocabulary(tuple(content["classnames"]), tuple(content["templates"]), bool(content.get("as_trained", False)))
