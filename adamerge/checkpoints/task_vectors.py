"""A file of task vectors as an expert: what it adds to its base is read as it is stored, never as a difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint, SafetensorsCheckpoint, Scan
from adamerge.checkpoints.lora_factors import Factors, no_change
from adamerge.errors import CheckpointError
from adamerge.io.dtypes import FORMAT_NAMES
from adamerge.io.safetensors_file import TensorFile
from adamerge.io.task_vector_file import task_vector_metadata
from adamerge.io.tensor_bytes import byte_chunks
from adamerge.io.untrusted_files import listed, quoted


class TaskVectorCheckpoint(Checkpoint):
    """A base as one task vector changes it: reads as a whole model, and gives its changes as deltas.

    The delta itself is what counts: ``(theta0 + tau) - theta0`` is not ``tau`` in fp32. A tensor that the file lacks is the
    base's, with factors of rank 0.

    Args:
        file: with deltas by the base's on-disk names.
        base: the model that they are added to.
        location: what errors print.

    Attributes:
        base: the model.
        metadata: of the file.

    Raises:
        CheckpointError: the file holds no task vectors, or names and shapes are not the base's.
    """

    def __init__(self, file: TensorFile, base: Checkpoint, location: str) -> None:
        self.location, self.base, self.metadata = location, base, task_vector_metadata(file)
        if not self.metadata["merged"]:
            raise CheckpointError(
                f"{quoted(location)} holds components of several experts, and not one task vector",
                got=f"{listed(self.metadata['experts'])}",
                todo="name it as model.task_vectors.components, beside the experts that it was made of",
            )
        self._deltas = SafetensorsCheckpoint(location, [file])
        self.sources = self._deltas.sources
        self.note = f", task vectors by {self.metadata['solver'].get('class_path', 'a solver')}"
        strange = [name for name in self._deltas if name not in base]
        if strange:
            raise CheckpointError(
                f"{quoted(location)} has {len(strange)} task vectors of tensors that the base lacks: {listed(strange)}",
                where=base.location,
                todo="merge it with the base that it was solved for",
            )
        for name in self._deltas:
            if self._deltas.shape(name) != base.shape(name):
                raise CheckpointError(
                    f"{quoted(location)}: the task vector of {quoted(name)} has another shape than in the base",
                    where=base.location,
                    expected=tuple(base.shape(name)),
                    got=tuple(self._deltas.shape(name)),
                    todo="merge it with the base that it was solved for",
                )
        self._entries = dict.fromkeys(base)

    def __getitem__(self, name: str) -> Tensor:
        self._entry(name)
        whole = self.base[name]
        return torch.add(whole, self._deltas[name]) if name in self._deltas else whole

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of one tensor."""
        self._entry(name)
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of one tensor: the wider of base and delta where there is a delta."""
        self._entry(name)
        stored = self.base.dtype(name)
        return torch.promote_types(stored, self._deltas.dtype(name)) if name in self._deltas else stored

    def factors(self, name: str) -> Factors | None:
        """Returns factors of rank 0 for a tensor that the file lacks; None where it has a delta."""
        self._entry(name)
        return None if name in self._deltas else no_change(self.base.shape(name))

    def delta(self, name: str) -> Callable[[], Tensor] | None:
        """Returns what reads the delta of one tensor; None where the file has none."""
        self._entry(name)
        return partial(self._deltas.__getitem__, name) if name in self._deltas else None

    def scan(self) -> Scan:
        """Returns the fingerprint of the deltas, not of the base, and their non-finite counts."""
        return self._deltas.scan()

    def check(self) -> None:
        """Raises CheckpointError when deltas are NaN or Inf, the file changed, or they were solved for another base."""
        super().check()
        expected = self.metadata["base"]["fingerprint"]
        if self.base.fingerprint != expected:
            raise CheckpointError(
                f"{quoted(self.location)} holds task vectors of another base",
                where=self.base.location,
                expected=f"fingerprint {expected[:16]}…",
                got=f"{self.base.fingerprint[:16]}…",
                todo="merge it with the base that it was solved for, or solve again",
            )

    def _stored(self, name: str) -> tuple[str, tuple[int, ...], Iterator[memoryview]]:
        tensor = self[name]
        return FORMAT_NAMES[tensor.dtype], tuple(tensor.shape), byte_chunks(tensor)
