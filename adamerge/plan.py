"""The plan: what a fit will take in memory with each storage, told from headers before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adamerge.memory import Available, Memory, Sizes
from adamerge.parametrizations import Parametrization
from adamerge.storage import FP32, Automatic, Disk, LowBit, Pinned, Resident, Storage
from adamerge.task_vectors import TaskVectors

LEARNING = 4 * FP32
"""Bytes for each learned number beside its value: its gradient, Adam's two moments, and what the guard can go back to."""


@dataclass(frozen=True)
class Plan:
    """What learning coefficients will take at its peak, when the gradient of the merged copy is contracted.

    Not in it, because it is not known before: activations, cached samples and teachers, and what the libraries take that
    the process is made of.

    Args:
        sizes: of the task vectors.
        coefficients: learned numbers of the experts.
        groups: of elements that share a coefficient.
        logits: of a mask.
        trained: of both, those that are learned.
        copy: bytes of the merged copy, with the tensors that are not merged.
        device: of the merges.
        there: memory that is available, before any of this is taken.
        storage: as configured.
    """

    sizes: Sizes
    coefficients: int
    groups: int
    logits: int
    trained: int
    copy: int
    device: torch.device
    there: Available
    storage: Storage = field(default_factory=Automatic)

    @classmethod
    def of(
        cls,
        vectors: TaskVectors,
        parametrization: Parametrization,
        copy: int,
        device: torch.device,
        storage: Storage,
        taken: Memory | None = None,
        processes: int | None = None,
    ) -> Plan:
        """From task vectors and a parametrization, which may be on the meta device.

        Args:
            vectors: base and experts; nothing of them is read.
            parametrization: of them.
            copy: bytes of the merged copy.
            device: of the merges.
            storage: as configured.
            taken: what of the plan this process has taken already.
            processes: of the run, that share this machine's memory.
        """
        there, taken = Available.on(device, processes), taken or Memory()
        values, logits = parametrization.values(), parametrization.masks()
        return cls(
            Sizes.of(vectors),
            sum(value.numel() for value in values.values()),
            len(values),
            sum(logit.numel() for logit in logits.values()),
            sum(parameter.numel() for parameter in parametrization.parameters() if parameter.requires_grad),
            copy,
            device,
            Available(
                None if there.host is None else there.host + taken.host,
                None if there.device is None else there.device + taken.device,
            ),
            storage,
        )

    @property
    def gradient(self) -> int:
        """Bytes of the merged copy's gradient."""
        return FP32 * self.sizes.merged

    @property
    def learned(self) -> int:
        """Bytes of coefficients and mask, with what learning needs."""
        return FP32 * (self.coefficients + self.logits) + LEARNING * self.trained

    @property
    def beside(self) -> Memory:
        """What is taken whatever the storage."""
        return Memory.of(self.copy + self.gradient + self.learned, self.device)

    @property
    def chosen(self) -> Storage:
        """The storage that will be used."""
        if isinstance(self.storage, Automatic):
            return self.storage.chosen(self.sizes, self.device, self.there, self.beside)
        return self.storage

    def peak(self, storage: Storage) -> Memory:
        """With one storage, all together."""
        return self.beside + storage.needs(self.sizes, self.device)

    def fits(self, storage: Storage) -> bool:
        """Whether a margin of the available memory is left beside it."""
        margin = self.storage.margin if isinstance(self.storage, Automatic) else Automatic().margin
        return self.peak(storage).fits(self.there, margin)

    @property
    def storages(self) -> list[Storage]:
        """The storages worth a line: what the configuration says, and the others there are."""
        known: list[Storage] = [Resident(), Disk()]
        if self.device.type != "cpu":
            known[1:1] = [Pinned()]
        if any(self.sizes.dense.values()):  # factors are never rounded
            known[-1:-1] = [Resident("bfloat16"), LowBit(8), LowBit(4)]
        return known if str(self.chosen) in map(str, known) else [self.chosen, *known]

    def advice(self) -> str | None:
        """What to do when the chosen storage does not fit; None when it does."""
        if self.fits(self.chosen):
            return None
        smaller = [storage for storage in self.storages if self.fits(storage)]
        if smaller:
            names = " or ".join(map(str, smaller))
            return f"{self.chosen} does not fit; take {names}, such as --model.storage={type(smaller[-1]).__name__}"
        on_disk = self.peak(Disk())
        short = on_disk.host if self.device.type == "cpu" else on_disk.device
        return (
            f"not even the merged copy and its gradient fit, {size(short)} with all experts on disk: merge fewer "
            "tensors (task_vectors.include), hold the copy in bfloat16 (backbone.dtype), or take a larger machine"
        )

    def record(self) -> dict[str, Any]:
        """For ``summary.json``: bytes."""
        return {
            "device": str(self.device),
            "storage": str(self.chosen),
            "coefficients": self.coefficients,
            "groups": self.groups,
            "mask_logits": self.logits,
            "available": {"host": self.there.host, "device": self.there.device},
            "merged_copy": self.copy,
            "gradient": self.gradient,
            "predicted_peak": {
                str(storage): {"host": self.peak(storage).host, "device": self.peak(storage).device}
                for storage in self.storages
            },
        }

    def table(self) -> Table:
        """A line for each storage."""
        on_device = self.device.type != "cpu"
        found = Table("storage", "host peak", *(["device peak"] if on_device else []), "fits", "rounding", box=None)
        for storage in self.storages:
            peak = self.peak(storage)
            columns = [peak.host, peak.device] if on_device else [peak.host]
            verdict = "yes" if self.fits(storage) else "no"
            verdict += ", chosen" if str(storage) == str(self.chosen) else ""
            found.add_row(escape(str(storage)), *map(size, columns), verdict, _rounding(storage))
        return found

    def __str__(self) -> str:
        mask = f" and a mask of {self.logits:,} logits" if self.logits else ""
        there = f"{size(self.there.host)} of host memory" + (
            "" if self.device.type == "cpu" else f" and {size(self.there.device)} of device memory"
        )
        return (
            f"on {self.device}: {self.sizes.experts} experts, {len(self.sizes.tensors)} tensors of {self.sizes.merged:,} "
            f"elements, {self.coefficients:,} coefficients in {self.groups:,} groups{mask}; {there} available. In every "
            f"peak: merged copy {size(self.copy)}, its gradient {size(self.gradient)}, learned numbers "
            f"{size(self.learned)}. Activations come on top: they are not known before."
        )


def print_plan(plan: Plan) -> None:
    """To the console, with what to do where the plan does not fit."""
    console = Console()
    console.print(escape(f"plan {plan}"), highlight=False)
    console.print(plan.table())
    advice = plan.advice()
    if advice is not None:
        console.print(escape(f"warning: {advice}"))


def copy_bytes(vectors: TaskVectors, dtype: torch.dtype) -> int:
    """Of a merged copy in ``dtype`` with a place for every tensor of the base, from headers."""
    base = vectors.base
    return sum(
        base.shape(name).numel() * (dtype if base.dtype(name).is_floating_point else base.dtype(name)).itemsize
        for name in base
    )


def size(nbytes: int | None) -> str:
    """Bytes for the eye."""
    if nbytes is None:
        return "?"
    unit = max(place for place in range(4) if nbytes >= 1024**place or place == 0)
    return f"{nbytes / 1024**unit:.{2 if unit else 0}f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


def _rounding(storage: Storage) -> str:
    if isinstance(storage, LowBit):
        return f"1/{254 if storage.bits == 8 else 14} of a block"
    return {"bfloat16": "2^-8", "float16": "2^-11"}.get(getattr(storage, "dtype", ""), "none")
