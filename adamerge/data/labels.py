"""Labels: what of a sample says what should be predicted, a column of classes or its own tokens, and how that is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import islice

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from adamerge.backbones import Backbone, Inputs
from adamerge.data.class_labels import LABEL, LabelPlace, classes_of, oddity
from adamerge.data.metrics import Accuracy, Metric, TokenLoss
from adamerge.data.samples import Samples
from adamerge.errors import DataError


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
        """Whether these rows say what should be predicted."""

    @abstractmethod
    def check(self, rows: datasets.Dataset, where: LabelPlace) -> None:
        """See whether all rows can be scored, from their labels alone: no sample is decoded.

        Raises:
            DataError: one cannot.
        """

    def oddity(self, rows: datasets.Dataset, where: LabelPlace) -> str | None:
        """Returns what to tell of labels that are scored by, and stops no fit; None where nothing is odd."""
        return None

    @abstractmethod
    def of(
        self, rows: datasets.Dataset, samples: Callable[[], Samples], backbone: Backbone | None, where: LabelPlace
    ) -> Labels:
        """The labels in the order of the rows.

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
        """Whether there is that column."""
        return LABEL in rows.column_names

    def check(self, rows: datasets.Dataset, where: LabelPlace) -> None:
        """See whether every label is one of the classes."""
        classes_of(rows, where)

    def oddity(self, rows: datasets.Dataset, where: LabelPlace) -> str | None:
        """A label that is no class, or a class without a row."""
        return oddity(rows, where)

    def of(
        self, rows: datasets.Dataset, samples: Callable[[], Samples], backbone: Backbone | None, where: LabelPlace
    ) -> Labels:
        """The column, as numbers of classes."""
        return Classes(classes_of(rows, where))


class TokenLabels(Labelling):
    """The tokens of the samples themselves, which every text has; scored by their loss."""

    metric = TokenLoss()

    def has(self, rows: datasets.Dataset) -> bool:
        """Always."""
        return True

    def check(self, rows: datasets.Dataset, where: LabelPlace) -> None:
        """They are what the samples are made of: what cannot be predicted is no sample."""
        return

    def of(
        self, rows: datasets.Dataset, samples: Callable[[], Samples], backbone: Backbone | None, where: LabelPlace
    ) -> Labels:
        """The tokens that the backbone counts, of every sample."""
        assert backbone is not None  # else there were no samples
        return Tokens(samples(), backbone.labels)


def shots(
    labels: Sequence[int],
    classes: int,
    each: int,
    generator: torch.Generator,
    where: str,
    usable: Callable[[int], bool] = lambda number: True,
) -> list[int]:
    """Numbers of ``each`` rows of every class, class by class, drawn at random.

    Args:
        labels: of the rows.
        classes: number of them.
        each: rows of a class.
        generator: of the order that they are drawn in.
        where: for errors.
        usable: whether a row can be a sample; another is drawn in place of one that cannot.

    Raises:
        DataError: a class has too few rows.
    """
    by_class: list[list[int]] = [[] for _ in range(classes)]
    for number in torch.randperm(len(labels), generator=generator).tolist():
        by_class[labels[number]].append(number)
    chosen: list[int] = []
    for label, drawn in enumerate(by_class):
        of_class = list(islice(filter(usable, drawn), each))
        if len(of_class) < each:
            raise DataError(
                f"{where}: class {label} has fewer samples than shots",
                expected=f"at least {each}",
                got=len(of_class),
                todo="lower data.shots, or give more calibration samples",
            )
        chosen += of_class
    return chosen
