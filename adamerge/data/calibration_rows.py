"""Calibration rows: which rows of a task a fit may draw from, as many as the settings say, and how many there are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from adamerge.backbones import Inputs
from adamerge.data.batch_order import seed_of
from adamerge.data.dataset import Dataset
from adamerge.data.drawn_splits import draw_some, needed
from adamerge.data.samples import can_be_used
from adamerge.data.shots import draw_shots

if TYPE_CHECKING:
    from adamerge.data.base import Calibration


def calibration_rows(
    data: Calibration, task: str, rows: Dataset, preprocess: Callable[[Any], Inputs] | None = None
) -> Dataset:
    """Returns a task's rows of the calibration split, with ``train_samples`` of train: ``calibration_samples`` or ``shots``.

    Args:
        data: whose settings they are.
        task: whose rows they are.
        rows: of its calibration split, or of its test split in the papers' transductive setting.
        preprocess: one value to tensors; shots are then drawn among the rows that it can make a sample of.

    Raises:
        DataError: rows of train are asked for, and there are none; or of ``shots`` a class has too few samples or a label
            is no class.
    """
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
    return rows


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
            used = len(data.rows(task, split))
            words += [f"and {more:,} of train"] if more else []
            words += [f"{used:,} of them used"] if used != there + more else []
        about = "; ".join(filter(None, words))
        told.append(f"{split} {there:,}{f' ({about})' if about else ''}")
    return ", ".join(told)
