"""How a model's folder looks to the library that loads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layout:
    """What stands in an exported folder.

    Attributes:
        weights: file name of the weights.
        files: name and content of the text files that go beside them.
    """

    weights: str = "model.safetensors"
    files: Mapping[str, str] = field(default_factory=dict)
