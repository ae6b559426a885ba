"""Chosen samples: objectives around another one, for which some samples count more than others, or not at all."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from adamerge.backbones import Batch, Output, Teacher
from adamerge.errors import ConfigError, DataError
from adamerge.objectives.base import Course, Objective, Predict, Samples
from adamerge.objectives.expert_labels import classes_of


class ChosenSamples(Objective, ABC):
    """The losses of another objective, whose samples weigh what the subclass says times what the other says.

    Args:
        objective: what the samples lose.

    Raises:
        ConfigError: in use: the objective puts other samples into the batch, which the expert has not seen.
    """

    taught = True

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.labelled, self.hidden = objective.labelled, objective.hidden

    @abstractmethod
    def share(self, batch: Batch) -> Tensor:
        """Returns what each sample weighs, ``(samples,)``, known before the forward pass."""

    def forward(self, output: Output, batch: Batch) -> Tensor:
        """Returns the other objective's losses, ``(samples,)``."""
        losses: Tensor = self.objective(output, batch)
        return losses

    def check(self, task: str, samples: Samples, classes: int) -> None:
        """Refuses data without classes, and lets the other objective check them.

        Raises:
            ConfigError: the task has no classes, or the other objective refuses it.
        """
        if classes < 2:
            raise ConfigError(
                f"{type(self).__name__} cannot weigh samples of task '{task}': it looks at one class per sample",
                expected="a task with classes",
                got=f"{classes} classes",
                todo="use the objective inside it by itself",
            )
        self.objective.check(task, samples, classes)

    def begin(self, course: Course) -> None:
        """Lets the other objective prepare for a fit."""
        self.objective.begin(course)

    def prepare(self, task: str, batch: Batch, predict: Predict) -> Batch:
        """Returns the batch as the other objective prepares it."""
        prepared = self.objective.prepare(task, batch, predict)
        if prepared.indices is not batch.indices:
            raise ConfigError(
                f"{type(self.objective).__name__} chooses other samples, of which {type(self).__name__} has no teacher",
                todo="use it by itself",
            )
        return prepared

    def weight(self, batch: Batch) -> Tensor:
        """Returns the product of both weights, ``(samples,)``."""
        return self.objective.weight(batch) * self.share(batch)


class WeightedByConfidence(ChosenSamples):
    """Samples weigh ``p^power``, p the probability of the class that their expert predicts; 0 where ``p < threshold``.

    Args:
        objective: what the samples lose.
        power: 1 for the probability itself, 0 for the threshold alone.
        threshold: that the probability must reach.

    Raises:
        ConfigError: a number is out of range; in use: a task has no classes.

    Reference: FixMatch (Sohn et al., 2020), https://arxiv.org/abs/2001.07685, for the threshold; here of the expert.
    """

    def __init__(self, objective: Objective, power: float = 1.0, threshold: float = 0.0) -> None:
        super().__init__(objective)
        if not (0 <= power < float("inf") and 0 <= threshold < 1):
            raise ConfigError(
                f"WeightedByConfidence: power must be at least 0 and threshold below 1, got {power} and {threshold}"
            )
        self.power, self.threshold = power, threshold

    def share(self, batch: Batch) -> Tensor:
        """Returns what each sample weighs, ``(samples,)``, by the expert's probabilities of what was kept of its logits."""
        p = _taught(self, batch).logits.float().softmax(dim=-1).amax(dim=-1)
        return (p >= self.threshold) * p**self.power


class WhereAgreed(ChosenSamples):
    """Only samples count of which merged model and expert predict the same class; what is right already is made surer.

    The merged model is asked before each step, without a gradient: one more forward pass.

    Args:
        objective: what the samples lose.

    Raises:
        ConfigError: in use: a task has no classes.

    Reference: co-training on samples that two models agree on: Blum & Mitchell, 1998,
    https://doi.org/10.1145/279943.279962.
    """

    def prepare(self, task: str, batch: Batch, predict: Predict) -> Batch:
        """Returns the batch with whether the merged model of this step and the expert agree on each sample."""
        batch = super().prepare(task, batch, predict)
        classes = predict(batch.inputs).logits.argmax(dim=-1)
        return batch._replace(agreed=classes == classes_of(_taught(self, batch)))

    def share(self, batch: Batch) -> Tensor:
        """Returns 1 for samples on which both agree, else 0; ``(samples,)``.

        Raises:
            DataError: ``prepare`` has not seen the batch.
        """
        if batch.agreed is None:
            raise DataError("WhereAgreed: nobody has asked the merged model", todo="let prepare() see it first")
        return batch.agreed.float()


def _taught(objective: Objective, batch: Batch) -> Teacher:
    if batch.teacher is None:
        raise DataError(f"{type(objective).__name__}: the batch has no teacher")
    return batch.teacher
