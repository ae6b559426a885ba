"""Labels: what of a sample says what should be predicted, a column of classes or its own tokens, and how that is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from adamerge.backbones import Backbone, Inputs
from adamerge.data.samples import Samples
from adamerge.errors import DataError
from adamerge.evaluation import Accuracy, Metric, TokenLoss

LABEL = "label"
"""Column of the classes, after a data module has arranged its columns."""


class Classes(Dataset[Tensor]):
    """The labels of a split that names a class for each sample."""

    def __init__(self, classes: Sequence[int]) -> None:
        self._classes = torch.tensor(list(classes), dtype=torch.int64)  # some data sets have truth values

    def __len__(self) -> int:
        return len(self._classes)

    def __getitem__(self, index: int) -> Tensor:
        return self._classes[index]


class Tokens(Dataset[Tensor]):
    """The labels of a split for a language model: the tokens of the samples themselves.

    Args:
        samples: of the split.
        labels: a preprocessed sample to its labels.
    """

    def __init__(self, samples: Samples, labels: Callable[[Inputs], Tensor]) -> None:
        self.samples, self.labels = samples, labels

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        return self.labels(self.samples[index])


Labels = Classes | Tokens


class Labelling(ABC):
    """Where the labels of a data module's samples are.

    Attributes:
        metric: how predictions are scored against them.
    """

    metric: Metric

    @abstractmethod
    def has(self, rows: datasets.Dataset) -> bool:
        """Whether these rows say what should be predicted."""

    @abstractmethod
    def of(
        self, rows: datasets.Dataset, samples: Callable[[], Samples], backbone: Backbone | None, where: str
    ) -> Labels:
        """The labels in the order of the rows.

        Args:
            rows: of one split.
            samples: gives the same rows, preprocessed.
            backbone: that preprocesses them.
            where: task and split, for errors.

        Raises:
            DataError: there are none.
        """


class ClassLabels(Labelling):
    """The column ``label``, an integer for each sample; scored by accuracy."""

    metric = Accuracy()

    def has(self, rows: datasets.Dataset) -> bool:
        """Whether there is that column."""
        return LABEL in rows.column_names

    def of(
        self, rows: datasets.Dataset, samples: Callable[[], Samples], backbone: Backbone | None, where: str
    ) -> Labels:
        """The column."""
        if not self.has(rows):
            raise DataError(f"{where} has no labels", expected=LABEL, got=rows.column_names)
        classes = list(rows[LABEL])
        none = next((label for label in classes if label is None or label < 0), 0)
        if none != 0:
            raise DataError(
                f"{where} has samples without a label",
                expected="classes from 0 on",
                got=none,
                todo="name a split whose labels are published, such as test: validation",
            )
        return Classes(classes)


class TokenLabels(Labelling):
    """The tokens of the samples themselves, which every text has; scored by their loss."""

    metric = TokenLoss()

    def has(self, rows: datasets.Dataset) -> bool:
        """Always."""
        return True

    def of(
        self, rows: datasets.Dataset, samples: Callable[[], Samples], backbone: Backbone | None, where: str
    ) -> Labels:
        """The tokens that the backbone counts, of every sample."""
        assert backbone is not None  # else there were no samples
        return Tokens(samples(), backbone.labels)


def shots(rows: datasets.Dataset, classes: int, each: int, generator: torch.Generator, where: str) -> list[int]:
    """Numbers of ``each`` rows of every class, class by class, drawn at random.

    Raises:
        DataError: the rows have no classes, or one has too few.
    """
    if LABEL not in rows.column_names:
        raise DataError(f"{where}: shots need labels", expected=LABEL, got=rows.column_names)
    labels = torch.tensor(list(rows[LABEL]), dtype=torch.int64)
    order = torch.randperm(len(rows), generator=generator)
    chosen: list[int] = []
    for label in range(classes):
        of_class = order[labels[order] == label]
        if len(of_class) < each:
            raise DataError(
                f"{where}: class {label} has fewer samples than shots",
                expected=f"at least {each}",
                got=len(of_class),
                todo="lower data.shots, or give more calibration samples",
            )
        chosen += of_class[:each].tolist()
    return chosen
