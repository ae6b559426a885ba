"""The memory plan: what a fit will take with each storage, told from headers before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from adamerge.merging.block_copy import BlockCopy
from adamerge.merging.copies import Copy, WholeCopy
from adamerge.merging.footprint import Footprint, Unit
from adamerge.parametrizations import Parametrization
from adamerge.task_vectors.automatic_storage import Automatic
from adamerge.task_vectors.memory import FP32, Available, Memory, Sizes, size
from adamerge.task_vectors.storage import Disk, LowBit, Pinned, Resident, Storage
from adamerge.task_vectors.task_vectors import TaskVectors

LEARNING = 4 * FP32
"""Bytes for each learned number beside its value: its gradient, Adam's two moments, and what the guard can go back to."""
MOST = 64
"""Largest number of processes to suggest where one does not do."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What learning coefficients will take in each process at its peak, when a gradient of the merged copy is contracted.

    Not in it, because it is not known before: loading the network, activations, cached samples and teachers, and what the
    libraries take that the process is made of.

    Args:
        sizes: of the task vectors.
        coefficients: learned numbers of the experts.
        groups: of elements that share a coefficient.
        logits: of a mask.
        trained: of both, those that are learned.
        units: of the network, with the tensors that are not merged.
        device: of the merges.
        there: memory that is available to a process, before any of this is taken.
        storage: as configured.
        copy: which weights exist when.
        processes: of the whole run.
        index_bytes: that contractions keep beside the learned numbers.
        transient_per_element: temporary bytes per element while tensors are summed.
    """

    sizes: Sizes
    coefficients: int
    groups: int
    logits: int
    trained: int
    units: Sequence[Unit]
    device: torch.device
    there: Available
    storage: Storage = field(default_factory=Automatic)
    copy: Copy = field(default_factory=WholeCopy)
    processes: int = 1
    index_bytes: int = 0
    transient_per_element: int = 0

    @classmethod
    def of(
        cls,
        vectors: TaskVectors,
        parametrization: Parametrization,
        *,
        units: Sequence[Unit],
        device: torch.device,
        storage: Storage,
        copy: Copy | None = None,
        processes: int = 1,
        local_world_size: int | None = None,
        taken: Memory | None = None,
    ) -> Plan:
        """Returns the plan of task vectors and a parametrization, which may be on the meta device.

        Args:
            vectors: base and experts; nothing of them is read.
            parametrization: of them.
            units: of the network.
            device: of the merges.
            storage: as configured.
            copy: which weights exist when; all when None.
            processes: of the whole run.
            local_world_size: of these, the ones that share this machine's memory.
            taken: what of the plan this process has taken already.
        """
        there, taken = Available.on(device, local_world_size), taken or Memory()
        values, logits = parametrization.values(), parametrization.masks()
        return cls(
            sizes=Sizes.of(vectors),
            coefficients=sum(value.numel() for value in values.values()),
            groups=len(values),
            logits=sum(logit.numel() for logit in logits.values()),
            trained=sum(parameter.numel() for parameter in parametrization.parameters() if parameter.requires_grad),
            units=units,
            device=device,
            there=Available(
                None if there.host is None else there.host + taken.host,
                None if there.device is None else there.device + taken.device,
            ),
            storage=storage,
            copy=copy if copy is not None else WholeCopy(),
            processes=processes,
            index_bytes=parametrization.index_bytes,
            transient_per_element=parametrization.transient_per_element,
        )

    @property
    def footprint(self) -> Footprint:
        """Bytes of the merged copy and its gradient."""
        return self.copy.footprint(self.units, self.processes)

    @property
    def learned(self) -> int:
        """Bytes of coefficients and mask, with what learning needs and keeps."""
        return FP32 * (self.coefficients + self.logits) + LEARNING * self.trained + self.index_bytes

    @property
    def beside(self) -> Memory:
        """Returns the memory that is taken whatever the storage."""
        return Memory.of(self.footprint.peak(self._summing) + self.learned, self.device)

    @property
    def chosen(self) -> Storage:
        """Returns the storage that a fit by this plan uses."""
        return self.storage.chosen(self.sizes, self.device, self.there, self.beside)

    def peak(self, storage: Storage) -> Memory:
        """Returns the memory of all together with one storage."""
        transient = storage.transient(self.sizes, self.device)
        contracting = transient.host if self.device.type == "cpu" else transient.device
        own = Memory.of(self.footprint.peak(contracting + self._summing) - contracting + self.learned, self.device)
        return own + transient + storage.footprint(self.sizes, self.device)

    @property
    def _summing(self) -> int:
        """Bytes that a sum takes for a moment, whatever it reads."""
        return self.transient_per_element * self.sizes.read(self.device)

    def fits(self, storage: Storage) -> bool:
        """Returns whether a margin of the available memory is left beside it."""
        return self.peak(storage).fits(self.there, self.storage.margin)

    @property
    def storages(self) -> list[Storage]:
        """Returns the storages to show: what the configuration says, and the others there are."""
        if self.copy.collective:
            return [self.chosen]
        known: list[Storage] = [Resident(), Disk()]
        if self.device.type != "cpu":
            known[1:1] = [Pinned()]
        if any(self.sizes.dense.values()):  # factors are never rounded
            known[-1:-1] = [Resident("bfloat16"), LowBit(8), LowBit(4)]
        return known if str(self.chosen) in map(str, known) else [self.chosen, *known]

    def advice(self) -> str | None:
        """Returns what to do when the chosen storage does not fit; None when it does."""
        if self.fits(self.chosen):
            return None
        smaller = [storage for storage in self.storages if self.fits(storage)]
        if smaller:
            names = " or ".join(map(str, smaller))
            return f"{self.chosen} does not fit; take {names}, such as --model.storage={type(smaller[-1]).__name__}"
        other = self._other_copy()
        if other is None:
            other = "merge fewer tensors (task_vectors.include), "
            other += "hold the copy in bfloat16 (backbone.dtype), or take a larger machine"
        return f"not even the merged copy and its gradient fit, {self._short()} with all experts on disk: {other}"

    def _other_copy(self) -> str | None:
        """Returns the advice to take another copy that fits where this one does not, the cheapest first; None without one."""
        blocks = replace(self, copy=BlockCopy())
        if self.footprint.peak() > blocks.footprint.peak() and blocks.fits(Disk()):
            return f"take --model.copy=BlockCopy, {blocks._short()} on disk"
        from adamerge.merging.sharded_copy import (
            ShardedCopy,  # not before it is needed: torch's part of it loads slowly
        )

        count = 2 if not self.copy.collective else self.processes + 1
        for processes in range(count, MOST + 1):
            sharded = replace(self, copy=ShardedCopy(), processes=processes)
            if sharded.fits(Disk()):
                kind = "machines" if self.device.type == "cpu" else "devices"
                return (
                    f"take --model.copy=ShardedCopy --trainer.strategy=ddp on {processes} {kind} like this, "
                    f"{sharded._short()} on each"
                )
        return None

    def _short(self) -> str:
        peak = self.peak(Disk())
        return size(peak.host if self.device.type == "cpu" else peak.device)

    def record(self) -> dict[str, Any]:
        """Returns the plan as ``summary.json`` has it, in bytes."""
        return {
            "device": str(self.device),
            "storage": str(self.chosen),
            "coefficients": self.coefficients,
            "groups": self.groups,
            "mask_logits": self.logits,
            "available": {"host": self.there.host, "device": self.there.device},
            "copy": str(self.copy),
            "processes": self.processes,
            "merged_copy": self.footprint.weights,
            "gradient": self.footprint.gradient,
            "running": self.footprint.running,
            "predicted_peak": {
                str(storage): {"host": self.peak(storage).host, "device": self.peak(storage).device}
                for storage in self.storages
            },
        }
