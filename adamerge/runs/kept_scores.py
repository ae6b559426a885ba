"""Kept scores: what each model scored on each sample, in files, so that a comparison that was ended goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

import adamerge
from adamerge.data.overlap import labelled_contents
from adamerge.errors import CheckpointError
from adamerge.io.atomic import staged_file
from adamerge.io.safetensors_file import TensorFile
from adamerge.training.scorer import Scorer, Scores

SCORES, CONFUSIONS = "scores/", "confusions/"
"""Begin the names of tensors in a file; the task's name follows."""


class KeptScores:
    """Scores of models on one split, each computed once and kept in a file named after a hash of all that it depends on.

    Args:
        folder: of the files.
        scorer: computes what is not there.
        of: what else the scores depend on besides the model and the samples: plain data.

    Attributes:
        skipped: number of rows of the split that are no samples, of each task that has some.
    """

    def __init__(self, folder: Path, scorer: Scorer, of: Mapping[str, Any]) -> None:
        self.folder, self.scorer = folder, scorer
        self.skipped: dict[str, int] = {}
        data = scorer.data
        self._of = {
            **of,
            "version": adamerge.__version__,
            "split": scorer.split,
            "metric": data.metric.name,
            "words": {task: [list(words.classnames), list(words.templates)] for task, words in data.tasks.items()},
            "rows": labelled_contents(data, scorer.split),
        }

    def of(self, model: Mapping[str, Any], compute: Callable[[], Scores]) -> Scores:
        """Returns the scores of a model by task; its confusions are the scorer's then, as after ``compute``.

        Args:
            model: what tells it from others: plain data.
            compute: has the scorer score it.
        """
        identity = json.dumps({**self._of, "model": dict(model)}, sort_keys=True, default=str)
        path = self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
        kept = _read(path)
        if kept is None:
            scores = compute()
            counts = {task: self.scorer.confusions[task] for task in scores if task in self.scorer.confusions}
            kept = _named(SCORES, scores) | _named(CONFUSIONS, counts)
            with staged_file(path) as temporary:
                skipped = json.dumps(self.scorer.data.skipped(self.scorer.split))
                safetensors.torch.save_file(kept, temporary, {"of": identity, "skipped": skipped})
        self.skipped |= json.loads(TensorFile(path).metadata["skipped"])
        self.scorer.confusions |= _under(CONFUSIONS, kept)
        return _under(SCORES, kept)


def _read(path: Path) -> dict[str, Tensor] | None:
    """Returns the tensors of a file; None where there is none that can be read."""
    if not path.is_file():
        return None
    try:
        file = TensorFile(path)
        return {name: file.read(name).clone() for name in file.tensors}
    except CheckpointError:
        return None  # damaged from outside: it is scored again


def _named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{task}": tensor.detach().cpu().contiguous() for task, tensor in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
