"""How a model's folder looks to the library that loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layout:
    """What stands in an exported folder.

    Attributes:
        weights: file name of the weights.
        files: name and content of the text files that go beside them.
        copied: names of the files of the base's folder that go beside them as they are; ``config.json`` with the dtype.
        heads: glob patterns of the tensors that every expert has of its own; they are never merged.
        aliases: second on-disk names of tied tensors, and the first name of each.
    """

    weights: str = "model.safetensors"
    files: Mapping[str, str] = field(default_factory=dict)
    copied: Sequence[str] = ()
    heads: Sequence[str] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
