"""Metrics: the score of each labelled sample, and which way is up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from adamerge.backbones import Output
from adamerge.backbones.losses import token_losses
from adamerge.data.agreement import Agreement, Divergence, SameClass


class Metric(ABC):
    """A score of each labelled sample; a task's score is their mean, a model's the plain mean over tasks.

    Attributes:
        name: as in metrics and summaries.
        unit: of a score times ``factor``, for tables.
        factor: by which tables multiply.
        higher_is_better: which way is up.
        agreement: with the task's expert, where there are no labels to score by.
    """

    name: str
    unit: str
    factor: float = 1.0
    higher_is_better: bool
    agreement: Agreement = Divergence()

    @abstractmethod
    def __call__(self, output: Output, labels: Tensor) -> Tensor:
        """Returns the score of each sample, ``(samples,)``."""

    def best(self, scores: Mapping[float, float]) -> float:
        """Returns the key whose score is best."""
        return (max if self.higher_is_better else min)(scores, key=lambda key: scores[key])


class Accuracy(Metric):
    """1 where the largest logit is the label's, else 0."""

    name, unit, factor, higher_is_better = "accuracy", "%", 100.0, True
    agreement = SameClass()

    def __call__(self, output: Output, labels: Tensor) -> Tensor:
        """Scores logits ``(samples, classes)`` by classes ``(samples,)``."""
        return (output.logits.argmax(dim=-1) == labels).float()


class TokenLoss(Metric):
    """Mean negative log-probability of each sample's tokens, in nats: what a language model is scored by."""

    name, unit, higher_is_better = "token_loss", "nats", False

    def __call__(self, output: Output, labels: Tensor) -> Tensor:
        """Scores logits ``(samples, positions, classes)`` by tokens ``(samples, positions)``."""
        return token_losses(output.cropped(labels.shape[1]), labels)
