"""An expert under its base's names: the same tensors and fingerprint, where a prefix alone tells the names apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from adamerge.checkpoints.checkpoint import Checkpoint, Scan
from adamerge.checkpoints.lora_factors import Factors
from adamerge.checkpoints.prefix_matching import Renaming, blocks
from adamerge.io.untrusted_files import quoted


class RenamedCheckpoint(Checkpoint):
    """A checkpoint whose tensors go by other names than in its file; the fingerprint is that of the file's content.

    Args:
        checkpoint: what it reads.
        names: each tensor's name to its name in ``checkpoint``.
    """

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str]) -> None:
        self.checkpoint, self.names = checkpoint, dict(names)
        self.location, self.sources = checkpoint.location, checkpoint.sources
        name, own = next((name, own) for name, own in sorted(self.names.items()) if name != own)
        self.note = f"{checkpoint.note}, which calls {quoted(name)} {quoted(own)}"
        self._entries = {name: self.names[name] for name in sorted(self.names)}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.checkpoint[self._entry(name)]

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of one tensor."""
        return self.checkpoint.shape(self._entry(name))

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of one tensor."""
        return self.checkpoint.dtype(self._entry(name))

    def factors(self, name: str) -> Factors | None:
        """Returns what the checkpoint has as factors."""
        return self.checkpoint.factors(self._entry(name))

    def delta(self, name: str) -> Callable[[], torch.Tensor] | None:
        """Returns what reads the delta that the checkpoint has."""
        return self.checkpoint.delta(self._entry(name))

    def own_name(self, name: str) -> str:
        """Returns the name in the file."""
        return self.checkpoint.own_name(self._entry(name))

    def scan(self) -> Scan:
        """Returns the file's fingerprint, and its non-finite counts by the names here."""
        scanned, names = self.checkpoint.scan(), {own: name for name, own in self.names.items()}
        return Scan(scanned.fingerprint, {names[own]: count for own, count in scanned.nonfinite.items()})

    def _stored(self, name: str) -> tuple[str, tuple[int, ...], Iterator[memoryview]]:
        return self.checkpoint._stored(self._entry(name))


def under_names_of(base: Checkpoint, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under the base's names; itself where they agree already, or no exchange of prefixes makes them agree.

    Raises:
        CheckpointError: no one exchange of prefixes leads to the base's names, or several do.
    """
    checkpoint = _respelled(base, checkpoint)
    if any(name in base for name in blocks(checkpoint)):
        return checkpoint
    names = Renaming(quoted(checkpoint.location), list(checkpoint), base).find_all()
    return RenamedCheckpoint(checkpoint, names) if any(name != own for name, own in names.items()) else checkpoint


SPELLINGS = ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias"))
"""How the first releases of BERT call what networks of today call otherwise, and save so."""


def _respelled(base: Checkpoint, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint in the base's spelling, where all of one are spelt one way and all of the other the other way."""
    exchanges = {}
    for pair in SPELLINGS:
        ours, theirs = (
            {end for end in pair if any(name.endswith(end) for name in model)} for model in (base, checkpoint)
        )
        if len(ours) == len(theirs) == 1 and ours != theirs:
            exchanges[theirs.pop()] = ours.pop()
    if not exchanges:
        return checkpoint
    names = {}
    for own in checkpoint:
        end = next((end for end in exchanges if own.endswith(end)), None)
        names[own if end is None else own.removesuffix(end) + exchanges[end]] = own
    return RenamedCheckpoint(checkpoint, names)
