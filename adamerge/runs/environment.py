"""The environment of a run: versions, threads, devices, models and data, which decide whether numbers repeat to the bit."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning import Trainer

import adamerge
from adamerge.errors import ConfigError
from adamerge.io.untrusted_files import read_json
from adamerge.task_vectors.task_vectors import TaskVectors

SAME_ON_RESUME = ("adamerge", "torch", "threads", "instructions", "world_size", "device", "models", "data")


def environment_of(
    trainer: Trainer | None, vectors: TaskVectors | None = None, protocol: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns all that decides whether a fit's numbers repeat to the bit: versions, threads, devices, models and data.

    Args:
        trainer: of the fit; None where nothing is fitted.
        vectors: whose base and experts are merged; each is told by its fingerprint.
        protocol: of the data.
    """
    return {
        "adamerge": adamerge.__version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # each set has kernels that add in an order of their own
        "world_size": trainer.world_size if trainer is not None else 1,
        "device": _device_name(trainer.strategy.root_device) if trainer is not None else "cpu",
        "models": {} if vectors is None else vectors.fingerprints(),
        "data": dict(protocol or {}),
    }


def refuse_difference(folder: Path, environment: Mapping[str, Any]) -> None:
    """Refuses to resume a run where it would not give the numbers that it would have given where it began.

    What an earlier version did not record is not compared.

    Raises:
        ConfigError: versions, threads, devices, models or data have changed.
    """
    before = read_json(folder / "environment.json")
    changed = [key for key in SAME_ON_RESUME if key in before and before[key] != _known(environment[key], before[key])]
    if changed:
        raise ConfigError(
            f"{folder}: resuming would not give the same numbers: {changed[0]} changed",
            expected={key: _differing(before.get(key), environment[key]) for key in changed},
            got={key: _differing(environment[key], before.get(key)) for key in changed},
            todo="run it where it ran before, or pass --allow-resume-difference",
        )


def _known(value: Any, before: Any) -> Any:
    """Returns a value; of a mapping, only the entries that were recorded before."""
    both = isinstance(value, dict) and isinstance(before, dict)
    return {name: one for name, one in value.items() if name in before} if both else value


def _differing(value: Any, other: Any) -> Any:
    """Returns a value; of a mapping, only the entries that differ from the other mapping."""
    if not isinstance(value, dict) or not isinstance(other, dict):
        return value
    return {name: one for name, one in value.items() if name not in other or other[name] != one}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
