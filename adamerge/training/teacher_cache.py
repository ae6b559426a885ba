"""Teacher caches: the outputs of each task's expert on the samples of a fit, each computed once and kept."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from adamerge.artifacts.recipe import plain_data
from adamerge.backbones import Batch, Teacher
from adamerge.backbones.inputs import moved, stack
from adamerge.backbones.lengths import lengths_of, longest_first, positions_of
from adamerge.data.batch_order import Steps
from adamerge.data.samples import Samples
from adamerge.data.teacher_outputs import Kept, Teach, compact, digest_of, expanded
from adamerge.errors import CheckpointError
from adamerge.io.atomic import staged_file, write_json
from adamerge.io.safetensors_file import TensorFile
from adamerge.merging.merged_model import MergedModel
from adamerge.training.strategy import Strategy
from adamerge.training.teachers import Show, Teachers, forward_context

FORMAT = 1
DIGESTS = "digests"


class TeacherCache(Teachers):
    """Outputs of the experts, in memory; filled before a fit, read by the data loader and its workers.

    The teacher of a task is the network filled with the task's expert; each sample that the fit's steps use goes through
    it once, beside others of like length. Only positions that count are kept. Each process keeps the samples of its own part
    of the batches.

    Args:
        top: keep the largest logits alone, so many of them; all when None.
        dtype: of the kept logits, less their largest where it is narrower than the network's; None for the network's own.

    Raises:
        ConfigError: a number is out of range, or an unknown dtype.
    """

    changing = False

    def __init__(self, top: int | None = None, dtype: str | None = None) -> None:
        super().__init__(top, dtype)
        self.found: dict[str, int] = {}
        self._memory: dict[tuple[str, int], Kept] = {}

    def __call__(self, task: str, index: int) -> Teacher:
        """Returns the expert's outputs of a sample, expanded to its positions up to the last that counts.

        Raises:
            KeyError: nothing was.
        """
        return expanded(self._kept(task, index))

    def begin(
        self,
        merged: MergedModel,
        steps: Steps,
        hidden: Sequence[float],
        *,
        show: Show,
        batch_size: int,
        strategy: Strategy,
        default_folder: Path,
    ) -> None:
        """Runs the experts on samples without outputs, without a gradient; leaves the network filled with an expert."""
        start = time.monotonic()
        self.forwards, self.found, self._memory = dict.fromkeys(steps.samples, 0), {}, {}
        for task, samples in steps.samples.items():
            self._open(task, merged, hidden, str(strategy.precision_plugin.precision), default_folder)
            wanted = self._wanted(task, steps)
            missing = [index for index in wanted if not self._holds(task, index, samples)]
            self.found[task] = len(wanted) - len(missing)
            if missing:
                merged.fill_expert(task)
                missing = _longest_first(missing, samples)
            for first in range(0, len(missing), batch_size):
                indices = missing[first : first + batch_size]
                inputs = stack([samples[index] for index in indices])
                with torch.no_grad(), forward_context(strategy):
                    encoded = merged(moved(inputs, merged.device), tuple(hidden))
                    output = merged.backbone.output(encoded, task)
                self._keep(task, dict(zip(indices, compact(output, self.top, self.dtype), strict=True)), samples)
                self.forwards[task] += len(indices)
        self._close(strategy, steps)
        self.seconds = time.monotonic() - start

    def of_samples(self) -> Teach:
        """Returns the cache itself: the data loader asks it for each sample."""
        return self

    def taught(self, batch: Mapping[str, Batch]) -> dict[str, Batch]:
        """Returns the batch as it is: the data loader has put the outputs into it."""
        return dict(batch)

    def in_memory(self) -> TeacherCache:
        """Returns an empty cache of the same settings, which keeps outputs in memory."""
        return TeacherCache(self.top, self.dtype)

    def report(self) -> dict[str, Any]:
        """Returns forward passes of this process, samples that were there already, and seconds, for the summary."""
        return {"forwards": self.forwards, "found": self.found, "seconds": round(self.seconds, 3)}

    def _open(
        self, task: str, merged: MergedModel, hidden: Sequence[float], precision: str, default_folder: Path
    ) -> None:
        return

    def _wanted(self, task: str, steps: Steps) -> list[int]:
        """Returns the samples that this process must have run: those of its own part of the batches."""
        mine = slice(steps.rank, None, steps.world_size)
        return sorted({index for step in range(steps.total) for index in steps.indices(task, step)[mine]})

    def _holds(self, task: str, index: int, samples: Samples) -> bool:
        return False

    def _keep(self, task: str, entries: Mapping[int, Kept], samples: Samples) -> None:
        self._memory |= {(task, index): kept for index, kept in entries.items()}

    def _kept(self, task: str, index: int) -> Kept:
        return self._memory[task, index]

    def _close(self, strategy: Strategy, steps: Steps) -> None:
        return


class TeacherFiles(TeacherCache):
    """Outputs of the experts in memory-mapped files: they outlive the process, and other fits may use them.

    An entry is found again when expert, base, network, head, precision and the sample's own content are the same. Files
    appear whole or not at all. Processes share the folder and the work: each sample is run by one of them.

    Args:
        top: keep the largest logits alone, so many of them; all when None.
        dtype: of the kept logits; None for the network's own.
        folder: where; ``teachers`` in the run's folder when None.
    """

    def __init__(self, top: int | None = None, dtype: str | None = None, folder: str | Path | None = None) -> None:
        super().__init__(top, dtype)
        self.folder = folder
        self._folders: dict[str, Path] = {}
        self._entries: dict[tuple[str, int, str], TensorFile] = {}  # by task, number and digest of the sample
        self._digests: dict[tuple[str, int], str] = {}  # of this fit's samples: a number may have been another's before

    def _open(
        self, task: str, merged: MergedModel, hidden: Sequence[float], precision: str, default_folder: Path
    ) -> None:
        self._entries = {key: entry for key, entry in self._entries.items() if key[0] != task}  # of an earlier fit
        vectors, head = merged.task_vectors, merged.backbone.heads.get(task)
        identity = {
            "format": FORMAT,
            "task": task,
            "expert": vectors.checkpoints[task].fingerprint,
            "base": vectors.base.fingerprint,
            "merged": hashlib.sha256(json.dumps(sorted(vectors)).encode()).hexdigest(),
            "head": None if head is None else digest_of(dict(head.state_dict())),
            "backbone": plain_data(merged.backbone, "told from others of its class", ", or keep teachers in memory"),
            "dtype": str(merged.dtype),
            "precision": precision,
            "hidden": list(hidden),
            "top": self.top,
            "kept": self.dtype,
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        folder = self._folders[task] = Path(self.folder or default_folder / "teachers") / key
        if not (folder / "identity.json").is_file():
            write_json(folder / "identity.json", identity)
        self._read(task)

    def _read(self, task: str) -> None:
        for path in sorted(self._folders[task].glob("*.safetensors")):
            try:
                file = TensorFile(path)
                digests = json.loads(file.metadata[DIGESTS])
            except (CheckpointError, KeyError, ValueError):
                continue  # damaged from outside; its samples are run again
            self._entries |= {(task, int(index), digest): file for index, digest in digests.items()}

    def _wanted(self, task: str, steps: Steps) -> list[int]:
        """Returns this process's share of the samples that all processes need."""
        wanted = {index for step in range(steps.total) for index in steps.indices(task, step)}
        return sorted(wanted)[steps.rank :: steps.world_size]

    def _holds(self, task: str, index: int, samples: Samples) -> bool:
        digest = self._digests[task, index] = digest_of(samples[index])
        return (task, index, digest) in self._entries

    def _keep(self, task: str, entries: Mapping[int, Kept], samples: Samples) -> None:
        digests = {str(index): self._digests[task, index] for index in entries}
        values = {f"{index}.{name}": value for index, kept in entries.items() for name, value in kept.items()}
        metadata = json.dumps(digests)
        path = self._folders[task] / f"{hashlib.sha256(metadata.encode()).hexdigest()[:16]}.safetensors"
        with staged_file(path) as temporary:
            temporary.write_bytes(safetensors.torch.save(values, {DIGESTS: metadata}))
        file = TensorFile(path)
        self._entries |= {(task, int(index), digest): file for index, digest in digests.items()}

    def _kept(self, task: str, index: int) -> Kept:
        file = self._entries[task, index, self._digests[task, index]]
        prefix = f"{index}."
        return {name.removeprefix(prefix): file.read(name) for name in file.tensors if name.startswith(prefix)}

    def _close(self, strategy: Strategy, steps: Steps) -> None:
        if steps.world_size > 1:
            strategy.barrier("teachers")
            for task, samples in steps.samples.items():
                self._read(task)
                for index in super()._wanted(task, steps):
                    self._digests[task, index] = digest_of(samples[index])


def _longest_first(indices: list[int], samples: Samples) -> list[int]:
    """Returns samples' numbers with those of like length side by side; as they are where all are of one length."""
    lengths = lengths_of([samples[index] for index in indices])
    return indices if lengths is None else [indices[place] for place in longest_first(positions_of(lengths)).tolist()]
