"""A start for tests: a file of deltas as a solver writes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

import adamerge
from adamerge.checkpoints.opening import open_checkpoint
from adamerge.io.task_vector_file import text_of
from adamerge.task_vectors.task_vectors import Source


def save_start(path: Path, deltas: Mapping[str, Tensor], base: Source) -> Path:
    """Write deltas of a base by on-disk name, and return the path."""
    metadata = {
        "version": adamerge.__version__,
        "merged": True,
        "solver": {"class_path": "adamerge.Tests", "init_args": {}},
        "base": {"fingerprint": open_checkpoint(base).fingerprint},
        "experts_from": {},
        "transforms": [],
        "protocol": {},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(deltas), path, text_of(metadata))
    return path
