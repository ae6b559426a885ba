"""Teacher files: the outputs of each task's expert in memory-mapped files, which outlive a fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch

from adamerge.artifacts.recipe import plain_data
from adamerge.data.batch_order import Steps
from adamerge.data.samples import Samples
from adamerge.data.teacher_outputs import Kept, digest_of
from adamerge.errors import CheckpointError
from adamerge.io.atomic import staged_file, write_json
from adamerge.io.safetensors_file import TensorFile
from adamerge.merging.merged_model import MergedModel
from adamerge.training.strategy import Strategy
from adamerge.training.teacher_cache import TeacherCache

FORMAT = 1
DIGESTS = "digests"


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

    def _afford(self, nbytes: float) -> None:
        """Takes whatever the files take: a disk that is full is told when they are written."""

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
