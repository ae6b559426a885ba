"""A file of components: each expert's task vector as factors of every matrix, which take the place of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from adamerge.checkpoints.checkpoint import Checkpoint, SafetensorsCheckpoint
from adamerge.checkpoints.lora_factors import Factors, matrix_shape, no_change
from adamerge.checkpoints.opening import opening
from adamerge.deltas.base import Deltas
from adamerge.deltas.low_rank import LowRankDeltas
from adamerge.deltas.streamed import StoredDeltas
from adamerge.errors import CheckpointError
from adamerge.io.safetensors_file import TensorFile
from adamerge.io.task_vector_file import DELTA, EXPERTS, FACTORS, task_vector_metadata
from adamerge.io.untrusted_files import listed, quoted


class ComponentFile(SafetensorsCheckpoint):
    """The tensors of a file of components, by the names that they have there.

    Of a matrix, a tensor's first dimension by all others, the product of ``(rows, n)`` and ``(n, columns)`` is an expert's
    delta; an expert that lacks it did not change the tensor. What is no matrix is a delta as such.

    Args:
        source: of the file.
        base: the model that it was decomposed for.

    Attributes:
        metadata: of the file.
        experts: names of those that it has components of, in order.

    Raises:
        CheckpointError: it holds no components, or of tensors that the base lacks or has in another shape.
    """

    def __init__(self, source: str | Path, base: Checkpoint) -> None:
        with opening("components"):
            file = TensorFile(Path(source).expanduser())
            self.metadata = task_vector_metadata(file)
            super().__init__(str(source), [file])
            if self.metadata["merged"]:
                raise CheckpointError(
                    f"{quoted(self.location)} holds one task vector and no components",
                    todo="run a stage with the solver adamerge.Components and name its file; or name this one as start",
                )
            self.experts = tuple(self.metadata[EXPERTS])
            self.note = f", components by {self.metadata['solver'].get('class_path', 'a solver')}"
            self.base = base
            self.names = self._checked_names()

    def _checked_names(self) -> frozenset[str]:
        """Returns the names of the base's tensors that it has something of."""
        starts = {f"{expert}/{kind}/": kind for expert in self.experts for kind in (FACTORS, DELTA)}
        found = set()
        for key in self:
            start = next((start for start in starts if key.startswith(start)), "")
            name = key.removeprefix(start)
            if not start or name not in self.base:
                raise CheckpointError(
                    f"{quoted(self.location)} has {quoted(key)}, which is of no expert and tensor of this base",
                    where=self.base.location,
                    todo="merge it with the base that it was made for",
                )
            shape, own = self.base.shape(name), self.shape(key)
            wanted = shape if starts[start] == DELTA else torch.Size([sum(matrix_shape(shape)), *(own[1:2] or [0])])
            if own != wanted:
                raise CheckpointError(
                    f"{quoted(self.location)}: {quoted(key)} has another shape than in the base",
                    where=self.base.location,
                    expected=tuple(wanted),
                    got=tuple(own),
                    todo="merge it with the base that it was made for",
                )
            found.add(name)
        return frozenset(found)

    def refuse_others(self, experts: Mapping[str, Checkpoint], names: Sequence[str]) -> None:
        """Refuses experts and tensors that it was not made of; no weight is read.

        Args:
            experts: of the pool, by name.
            names: of the tensors that are merged.

        Raises:
            CheckpointError: they are others.
        """
        own = self.metadata["experts_from"]
        if own.keys() != experts.keys():
            raise CheckpointError(
                f"{quoted(self.location)} holds components of other experts",
                expected=sorted(own),
                got=sorted(experts),
                todo="give both stages the same pool",
            )
        missing = [name for name in names if name not in self.names]
        if missing:
            raise CheckpointError(
                f"{quoted(self.location)} lacks {len(missing)} tensors that are merged: {listed(missing)}",
                todo="give both stages the same include and exclude",
            )

    def deltas(self, name: str, device: torch.device) -> Deltas:
        """Returns all experts' deltas of a tensor: factors of a matrix, or of what is none the deltas as such.

        Args:
            name: of the tensor, on disk.
            device: where they are summed.
        """
        shape = self.base.shape(name)
        if f"{self.experts[0]}/{DELTA}/{name}" in self:
            readers = [partial(self.__getitem__, f"{expert}/{DELTA}/{name}") for expert in self.experts]
            return StoredDeltas(readers, shape, device)
        return LowRankDeltas.of([self._factors(expert, name) for expert in self.experts], shape, device)

    def check_models(self, experts: Mapping[str, Checkpoint]) -> None:
        """Checks whether base and experts are those that it was made of; reads every weight, once.

        Raises:
            CheckpointError: one is not, a number is NaN or Inf, or the file changed since it was opened.
        """
        self.check()
        models = [("the base", self.metadata["base"], self.base)]
        models += [(f"expert '{task}'", self.metadata["experts_from"][task], own) for task, own in experts.items()]
        for who, entry, model in models:
            if model.fingerprint != entry["fingerprint"]:
                raise CheckpointError(
                    f"{quoted(self.location)} was made of another model than {who}",
                    where=model.location,
                    expected=f"fingerprint {entry['fingerprint'][:16]}…",
                    got=f"{model.fingerprint[:16]}…",
                    todo="run the stage that made it again, with this pool",
                )

    def _factors(self, expert: str, name: str) -> Factors:
        key, rows = f"{expert}/{FACTORS}/{name}", matrix_shape(self.base.shape(name))[0]
        if key not in self:
            return no_change(self.base.shape(name))

        def left() -> Tensor:
            return self[key][:rows]

        def right() -> Tensor:
            return self[key][rows:].t()

        return Factors(self.shape(key)[1], 1.0, left, right)
