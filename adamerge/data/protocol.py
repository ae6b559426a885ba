"""The data protocol: which data a run used, as its summary, its coefficient file and the model's card record it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adamerge.data.held_out import HELD_OUT

if TYPE_CHECKING:
    from adamerge.data.base import Calibration


def protocol(data: Calibration) -> dict[str, Any]:
    """Returns splits, labels, numbers of samples and the seed of a run's data."""
    source = "test" if data.transductive else "calibration and train" if data.train_samples else "calibration"
    return {
        "calibration_split": f"{source}, {'labelled' if data.labelled else 'labels never read'}",
        "transductive": data.transductive,
        "labelled": data.labelled,
        "shots": data.shots,
        "calibration_samples": {task: data.count(task, "calibration") for task in data.fitted},
        **({"held_out_samples": _held_out(data)} if data.held_out else {}),
        **({"train_samples": _of_train(data)} if data.train_samples else {}),
        "test_samples": {task: data.count(task, "test") for task in data.tasks if "test" in data.splits(task)},
        "seed": data.seed,
        **({"skipped_rows": skipped} if (skipped := data.skipped("calibration")) else {}),
    }


def _held_out(data: Calibration) -> dict[str, int]:
    """Returns how many calibration inputs of each task no step sees; ``calibration_samples`` does not count them."""
    return {task: data.count(task, HELD_OUT) for task in data.fitted}


def _of_train(data: Calibration) -> dict[str, int]:
    """Returns how many rows of each task's train split stand beside its calibration split, before some are drawn."""
    return {task: min(data.train_samples, len(data.splits(task)["train"])) for task in data.fitted}
