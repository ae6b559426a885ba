"""Calibration rows: which rows of a task a fit may draw from, as many as the settings say, and how many there are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from adamerge.backbones import Inputs
from adamerge.data.batch_order import seed_of
from adamerge.data.dataset import Dataset
from adamerge.data.drawn_splits import draw_some, needed
from adamerge.data.held_out import CALIBRATION, HELD_OUT, calibration_splits, divided
from adamerge.data.samples import can_be_used
from adamerge.data.shots import draw_shots

if TYPE_CHECKING:
    from adamerge.data.base import Calibration


def calibration_rows(
    data: Calibration, task: str, preprocess: Callable[[Any], Inputs] | None = None
) -> dict[str, Dataset]:
    """Returns a task's calibration rows, with ``train_samples`` of train: ``calibration_samples`` or ``shots`` of them.

    Args:
        data: whose settings they are; the rows are those of the test split in the papers' transductive setting.
        task: whose rows they are.
        preprocess: one value to tensors; shots are then drawn among the rows that it can make a sample of.

    Returns:
        Those of a fit's steps, and those that are held out, by the names that ``held_out.py`` has for them.

    Raises:
        DataError: there are none, or none of train where they are asked for; or of ``shots`` a class has too few samples or a
            label is no class; or too few to hold some out.
    """
    rows = needed(data.splits(task), "test" if data.transductive else CALIBRATION, task)
    if data.train_samples:
        from datasets import concatenate_datasets

        train = needed(data.splits(task), "train", task)
        more = draw_some(train, data.train_samples, seed_of(data.seed, task, "train_samples"))
        rows = concatenate_datasets([rows, more])
    if data.calibration_samples is not None:
        rows = draw_some(rows, data.calibration_samples, seed_of(data.seed, task, "calibration_samples"))
    if data.shots is not None:
        usable = None if preprocess is None else partial(can_be_used, rows, data.columns(task), preprocess)
        where, seed = data.label_place(task, "calibration"), seed_of(data.seed, task, "shots")
        rows = rows.select(draw_shots(rows, where, data.shots, seed, usable))
    return divided(rows, data.held_out, task, seed_of(data.seed, task, HELD_OUT))


def sizes(data: Calibration, task: str) -> str:
    """Returns size and origin of a task's splits in words: ``calibration 152 (drawn from 1,520 rows of train), test 24``."""
    splits, told = data.splits(task), []
    for split in ("calibration", "validation", "test"):
        papers = split == "calibration" and data.transductive
        if not papers and split not in splits:
            continue
        there = len(splits["test" if papers else split])
        words = ["the test split's inputs, transductive" if papers else data.origin(task, split)]
        if split == "calibration":
            more = min(data.train_samples, len(splits.get("train", ())))
            used = {part: len(data.rows(task, part)) for part in calibration_splits(data)}
            words += [f"and {more:,} of train"] if more else []
            words += [f"{sum(used.values()):,} of them used"] if sum(used.values()) != there + more else []
            words += [f"{used[HELD_OUT]:,} held out"] if HELD_OUT in used else []
        about = "; ".join(filter(None, words))
        told.append(f"{split} {there:,}{f' ({about})' if about else ''}")
    return ", ".join(told)
