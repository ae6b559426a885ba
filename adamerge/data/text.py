"""Text classification tasks: sentences, or pairs of them, with labels for reporting."""

from __future__ import annotations

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
        """Returns the column of the text, or of both; a pair is preprocessed as ``{"text", "pair"}``."""
        return {self.text_column: "text"} | ({self.pair_column: "pair"} if self.pair_column is not None else {})


@dataclass(eq=False, kw_only=True)
class TextCalibration(ClassCalibration[TextTask]):
    """Text classification tasks by name.

    Args:
        tasks: task name to its data.
    """

    tasks: dict[str, TextTask] = field(repr=False)
