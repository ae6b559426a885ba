"""How a model's folder looks to the library that loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch


@dataclass(frozen=True)
class Layout:
    """The names of the files and tensors of an exported folder.

    Attributes:
        weights: file name of the weights.
        files: name and content of the text files that go beside them.
        copied: names of the files that are copied from the base's folder.
        heads: glob patterns of tensors that are each model's own: never merged, exported beside the trunk.
        copies: name of a tied tensor's second copy in the file to the name it must equal.
        wide: names of tensors that the network keeps in fp32 whatever the dtype of the others; they are exported so.
    """

    weights: str = "model.safetensors"
    files: Mapping[str, str] = field(default_factory=dict)
    copied: Sequence[str] = ()
    heads: Sequence[str] = ()
    copies: Mapping[str, str] = field(default_factory=dict)
    wide: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("copied", "heads", "wide"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # so that one read from a file is equal

    @property
    def divisible(self) -> bool:
        """Returns whether the library finds weights in several files, by an index: transformers does, open_clip not."""
        return self.weights == Layout.weights

    def stored_as(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Returns the dtype of a floating-point tensor where the others have this one."""
        return torch.promote_types(dtype, torch.float32) if self.copies.get(name, name) in self.wide else dtype

    def is_head(self, name: str) -> bool:
        """Returns whether the tensor of this name is each model's own."""
        return any(fnmatchcase(name, pattern) for pattern in self.heads)
