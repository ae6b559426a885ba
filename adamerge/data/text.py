"""Text classification tasks: sentences, or pairs of them, with labels for reporting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from adamerge.data.classes import ClassCalibration, ClassTable


@dataclass
class TextTask(ClassTable):
    """One task's texts, and the words for its zero-shot head where it has one.

    Args:
        dataset: a folder written by ``save_to_disk``, a data file (JSON, CSV, Parquet) or a folder of them, named by splits,
            or a Hub id.
        templates: prompts with ``{}`` where the class name goes; empty where experts bring heads of their own.
        classnames: in label order; the data set's own when empty.
        config: of a Hub data set that has several, such as ``mnli`` of GLUE.
        test: name of the split for reporting.
        train: name of the split from which the others are drawn, where the data set lacks them.
        text_column: holds the text.
        pair_column: holds the second text of a pair.
        label_column: holds the label, an integer from 0 on or a class's name.
    """

    text_column: str = field(default="text", kw_only=True)
    pair_column: str | None = field(default=None, kw_only=True)

    @property
    def inputs(self) -> dict[str, str]:
        """The text, or both texts; a pair is preprocessed as ``{"text", "pair"}``."""
        return {self.text_column: "text"} | ({self.pair_column: "pair"} if self.pair_column is not None else {})


class TextCalibration(ClassCalibration):
    """Text classification tasks by name.

    Args:
        tasks: task name to its data.
        batch_size: samples per task and step, over all processes.
        seed: of the order of batches and of splits that are drawn.
        transductive: calibrate on the inputs of the test split, as the papers do; written into the summary and the card.
        labelled: hand the labels to the objective.
        calibration_samples: use so many of each task's calibration samples; all when None.
        eval_batch_size: samples per batch in validation and test.
        workers: processes that decode; 0 decodes in the main process.
        calibration_fraction: share of ``train`` that is drawn, where the data set has no split of that name.
        validation_fraction: likewise.
        test_fraction: likewise, and at most what the others leave; labelled as far as ``train`` is.
        shots: calibrate on so many samples of each class, drawn by ``seed``; needs ``labelled``.
        only: calibrate and validate on these tasks alone, though the pool has experts of others; all when None.
        unusable_share: of a split's rows that may be skipped because nothing can be made of them.

    Raises:
        ConfigError: no tasks, an unknown vocabulary, or fractions out of range.
        DataError: a data set cannot be read, lacks a column, or orders the same classes differently.
    """

    def __init__(
        self,
        tasks: dict[str, TextTask],
        batch_size: int = 16,
        seed: int = 0,
        transductive: bool = False,
        labelled: bool = False,
        calibration_samples: int | None = None,
        eval_batch_size: int = 256,
        workers: int = 0,
        calibration_fraction: float = 0.1,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        shots: int | None = None,
        only: Sequence[str] | None = None,
        unusable_share: float = 0.05,
    ) -> None:
        super().__init__(
            tasks,
            batch_size,
            seed,
            transductive,
            labelled,
            calibration_samples,
            eval_batch_size,
            workers,
            calibration_fraction,
            validation_fraction,
            test_fraction,
            shots,
            only,
            unusable_share,
        )
