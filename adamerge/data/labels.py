"""Labels: what of a sample says what should be predicted, a column of classes or its own tokens, and how that is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from adamerge.backbones import Backbone, Inputs
from adamerge.data.class_labels import LABEL, LabelPlace, begins_at_one, classes_of, oddity
from adamerge.data.metrics import Accuracy, Metric, TokenLoss
from adamerge.data.samples import Samples

if TYPE_CHECKING:
    import datasets


class Classes(Dataset[Tensor]):
    """The labels of a split that names a class for each sample."""

    def __init__(self, classes: Sequence[int]) -> None:
        self._classes = torch.tensor(list(classes), dtype=torch.int64)

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
        """Returns whether these rows say what should be predicted."""

    @abstractmethod
    def check(self, rows: datasets.Dataset, where: LabelPlace) -> None:
        """Checks that all rows can be scored, from their labels alone: no sample is decoded.

        Raises:
            DataError: one cannot.
        """

    def check_numbering(self, rows: datasets.Dataset, where: LabelPlace) -> None:
        """Refuses labels of another split of the task that are numbered in another way than those that are scored.

        Raises:
            DataError: they are.
        """
        return

    def oddity(self, rows: datasets.Dataset, where: LabelPlace) -> str | None:
        """Returns what to tell of labels that are scored by, and stops no fit; None where nothing is odd."""
        return None

    @abstractmethod
    def of(
        self, rows: datasets.Dataset, samples: Callable[[], Samples], backbone: Backbone | None, where: LabelPlace
    ) -> Labels:
        """Returns the labels in the order of the rows.

        Args:
            rows: of one split, those that are samples.
            samples: gives the same rows, preprocessed.
            backbone: that preprocesses them.
            where: task, split and column, and the classes.

        Raises:
            DataError: there are none, or one is no class.
        """


class ClassLabels(Labelling):
    """The column ``label``, an integer or a class's name for each sample; scored by accuracy."""

    metric = Accuracy()

    def has(self, rows: datasets.Dataset) -> bool:
        """Returns whether the rows have a column of labels."""
        return LABEL in rows.column_names

    def check(self, rows: datasets.Dataset, where: LabelPlace) -> None:
        """Checks that every label is one of the classes."""
        classes_of(rows, where)

    def check_numbering(self, rows: datasets.Dataset, where: LabelPlace) -> None:
        """Refuses numbers from 1 on: where few rows lack the last class, only another split tells that they begin at 1."""
        if self.has(rows) and begins_at_one(rows, where):
            classes_of(rows, where)

    def oddity(self, rows: datasets.Dataset, where: LabelPlace) -> str | None:
        """Returns which label is no class, or which class has no row; None where nothing is odd."""
        return oddity(rows, where)

    def of(
        self, rows: datasets.Dataset, samples: Callable[[], Samples], backbone: Backbone | None, where: LabelPlace
    ) -> Labels:
        """Returns the column of labels, as numbers of classes."""
        return Classes(classes_of(rows, where))


class TokenLabels(Labelling):
    """The tokens of the samples themselves, which every text has; scored by their loss."""

    metric = TokenLoss()

    def has(self, rows: datasets.Dataset) -> bool:
        """Returns True: every text has tokens."""
        return True

    def check(self, rows: datasets.Dataset, where: LabelPlace) -> None:
        """Does nothing: tokens are what the samples are made of, and what cannot be predicted is no sample."""
        return

    def of(
        self, rows: datasets.Dataset, samples: Callable[[], Samples], backbone: Backbone | None, where: LabelPlace
    ) -> Labels:
        """Returns the tokens that the backbone counts, of every sample."""
        assert backbone is not None  # else there were no samples
        return Tokens(samples(), backbone.labels)
