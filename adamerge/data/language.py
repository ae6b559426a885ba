"""Tasks of language models: their score is the loss of the tokens, in nats, and the tokens are the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from adamerge.backbones import Task
from adamerge.data.dataset import Dataset
from adamerge.data.labels import TokenLabels
from adamerge.data.table_calibration import TableCalibration
from adamerge.data.tables import Table
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
        """Refuses templates that cannot be filled, before any data set is opened.

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
        """Returns what the backbone preprocesses: a text, ``{"prompt", "response"}``, or ``{"messages"}``.

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
        """Returns the names of the data set's columns that a sample is made of."""
        if self.messages is not None:
            return [self.messages]
        names = [*_names(self.text), *_names(self.response or "")]
        return sorted({name.partition(".")[0].partition("[")[0] for name in names})


def _names(template: str) -> list[str]:
    """Returns what stands in the braces of a template."""
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


@dataclass(eq=False, kw_only=True)
class LanguageCalibration(TableCalibration[LanguageTask]):
    """Texts of causal and of sequence-to-sequence models, by task.

    Args:
        tasks: task name to its data.
    """

    tasks: dict[str, LanguageTask] = field(repr=False)  # type: ignore[assignment]
    labelling = TokenLabels()

    def words(self, task: str) -> Task:
        """Returns no words: a language model needs none for its heads."""
        return Vocabulary((), ())

    def columns(self, task: str) -> tuple[str, ...]:
        """Returns the names of the columns that make a sample of a task."""
        return tuple(self.sources[task].fields())

    def read(self, task: str, split: str, value: Any) -> Any:
        """Fills the templates; without labels, no response is calibrated on that is not the task's input."""
        source = self.sources[task]
        responds = split != "calibration" or self.labelled or source.response_is_input
        return source.sample(value if len(self.columns(task)) > 1 else {self.columns(task)[0]: value}, responds)

    @property
    def protocol(self) -> dict[str, Any]:
        """Returns which data a run used, and for which tasks responses were read as text, where labels were not."""
        sources = {task: self.sources[task] for task in self.fitted}
        read = [
            task
            for task, source in sources.items()
            if source.messages is not None or (source.response is not None and source.response_is_input)
        ]
        return super().protocol | ({"responses_read_as_text": read} if read and not self.labelled else {})

    def arrange(self, task: str, split: str, rows: Dataset) -> Dataset:
        """Returns the rows with their columns as they are, which the templates name."""
        self.sources[task].need(task, split, rows, self.sources[task].fields())
        return rows
