"""Tasks of language models: their score is the loss of the tokens, in nats, and the tokens are the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

import datasets

from adamerge.backbones import Task
from adamerge.data.labels import TokenLabels
from adamerge.data.tables import Table, TableCalibration
from adamerge.data.vocabulary import Vocabulary
from adamerge.errors import ConfigError, DataError


@dataclass
class LanguageTask(Table):
    """Text that a language model reads, or prompts with responses.

    ``text`` and ``response`` are templates over the row's columns: ``"{text}"``, or ``"Question: {question} Answer:"``.

    Args:
        dataset: a folder written by ``save_to_disk``, a data file (JSON, JSON lines, CSV, Parquet, text) or a folder of them,
            named by splits, or a Hub id.
        text: the whole text when there is no response, else the prompt.
        response: what the model should say; only its tokens count then. It is a label: calibration without labels reads the
            prompt alone, unless ``response_is_input``.
        messages: column of a chat, a list of ``{"role", "content"}``, instead of both; the assistant's turns count. It is
            text, and read whole.
        words: for columns of numbers, the word of each number: ``{label: [negative, positive]}``.
        config: of a Hub data set that has several.
        test: name of the split for reporting.
        train: name of the split from which the others are drawn, where the data set lacks them.
        response_is_input: read the response as text that follows the prompt, also without labels, as Expert Merging does; the
            summary and the card then say so.
    """

    text: str = "{text}"
    response: str | None = None
    messages: str | None = None
    words: dict[str, list[str]] = field(default_factory=dict)
    response_is_input: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse templates that cannot be filled, before any data set is opened.

        Raises:
            ConfigError: one cannot, or they name no column.
        """
        for key, template in (("text", self.text), ("response", self.response or "")):
            try:
                names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
                reason = (
                    "names no column in its braces" if any(not name or name[0].isdigit() for name in names) else None
                )
            except ValueError as error:
                reason = f"cannot be filled ({error})"
            if reason is not None:
                raise ConfigError(
                    f"the task of {self.dataset}: {key} '{template}' {reason}",
                    expected="columns in braces, as in 'Question: {question} Answer:'; '{{' for a brace of the text",
                    got=f"'{template}'",
                )
        if self.response is not None and not _names(self.response):
            raise ConfigError(
                f"the task of {self.dataset}: response '{self.response}' is the same for all rows: it names no column",
                todo=f"name the column in braces, as in response: '{{{self.response}}}'",
            )
        if not self.fields():
            raise ConfigError(
                f"the task of {self.dataset}: text '{self.text}' is the same for all rows: it names no column"
            )

    def sample(self, row: Mapping[str, Any], responds: bool = True) -> Any:
        """What the backbone preprocesses: a text, ``{"prompt", "response"}``, or ``{"messages"}``.

        Args:
            row: of the data set.
            responds: with the response, where there is one; else the prompt is all of the text.
        """
        if self.messages is not None:
            return {"messages": row[self.messages]}
        named = _Row(row, self.words)
        if self.response is None or not responds:
            return self.text.format_map(named)
        return {"prompt": self.text.format_map(named), "response": self.response.format_map(named)}

    def fields(self) -> list[str]:
        """The data set's columns that a sample is made of."""
        if self.messages is not None:
            return [self.messages]
        names = [*_names(self.text), *_names(self.response or "")]
        return sorted({name.partition(".")[0].partition("[")[0] for name in names})


def _names(template: str) -> list[str]:
    """What stands in the braces of a template."""
    return [name for _, name, _, _ in Formatter().parse(template) if name]


class _Row(dict[str, Any]):
    """A row for templates: no text where a value is missing, and words for numbers once a template asks for them."""

    def __init__(self, row: Mapping[str, Any], words: Mapping[str, Sequence[str]]) -> None:
        super().__init__({name: "" if value is None else value for name, value in row.items() if name not in words})
        self.row, self.words = row, words

    def __missing__(self, column: str) -> str:
        number, words = self.row[column], self.words[column]
        if not isinstance(number, int) or not 0 <= number < len(words):
            raise DataError(
                f"column '{column}' holds {number!r}, which none of the words stands for",
                expected=f"0 to {len(words) - 1}: {list(words)}",
                got=number,
                todo="name a split whose labels are published, such as test: validation",
            )
        return words[number]


class LanguageCalibration(TableCalibration):
    """Texts of causal and of sequence-to-sequence models, by task.

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
        tasks: dict[str, LanguageTask],
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

    sources: Mapping[str, LanguageTask]  # type: ignore[assignment]
    labelling = TokenLabels()

    @property
    def tasks(self) -> Mapping[str, Task]:
        """The tasks; a language model needs no words for its heads."""
        return {task: Vocabulary((), ()) for task in self.sources}

    def columns(self, task: str) -> tuple[str, ...]:
        """The columns that make a sample."""
        return tuple(self.sources[task].fields())

    def read(self, task: str, split: str, value: Any) -> Any:
        """Fill the templates; without labels, no response is calibrated on that is not the task's input."""
        source = self.sources[task]
        responds = split != "calibration" or self.labelled or source.response_is_input
        return source.sample(value if len(self.columns(task)) > 1 else {self.columns(task)[0]: value}, responds)

    @property
    def protocol(self) -> dict[str, Any]:
        """As of all data; and of which tasks the responses were read as text, where labels were not."""
        sources = {task: self.sources[task] for task in self.fitted}
        read = [
            task
            for task, source in sources.items()
            if source.messages is not None or (source.response is not None and source.response_is_input)
        ]
        return super().protocol | ({"responses_read_as_text": read} if read and not self.labelled else {})

    def arrange(self, task: str, split: str, rows: datasets.Dataset) -> datasets.Dataset:
        """The columns as they are."""
        self.sources[task].need(task, split, rows, self.sources[task].fields())
        return rows
