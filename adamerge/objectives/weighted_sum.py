"""Sums of objectives: several drive the coefficients at once, each with a factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from adamerge.backbones import Batch, Output
from adamerge.errors import ConfigError
from adamerge.objectives.base import Course, Objective, Predict, Samples


class Sum(Objective):
    """``sum_i factors[i] * parts[i]``, of one forward pass.

    It needs labels, teacher and hidden states when a part does, and each part sees only what it asks for. The parts prepare
    the batch one after the other; a sample's weight is the product of theirs, so that a part that leaves samples out
    leaves them out of the sum.

    Args:
        parts: the objectives.
        factors: one per part; 1 each when None.

    Raises:
        ConfigError: there are no parts, or not as many factors.

    Reference: Expert Merging (Zhang et al., 2025), https://arxiv.org/abs/2509.25712, is LogitAlignment plus HiddenAlignment.
    """

    def __init__(self, parts: Sequence[Objective], factors: Sequence[float] | None = None) -> None:
        super().__init__()
        if not parts or (factors is not None and len(factors) != len(parts)):
            raise ConfigError(
                "Sum: one factor per part is needed", expected=len(parts) or "at least one part", got=factors
            )
        self.parts = list(parts)
        self._registered = nn.ModuleList(parts)  # what has buffers follows the model to its device
        self.factors = [1.0] * len(parts) if factors is None else list(factors)
        self.labelled = any(part.labelled for part in parts)
        self.taught = any(part.taught for part in parts)
        self.hidden = tuple(dict.fromkeys(number for part in parts for number in part.hidden))

    def forward(self, output: Output, batch: Batch) -> Tensor:
        """Returns the weighted sum of the parts' losses, ``(samples,)``."""
        losses = [
            factor * part(self._output(part, output), self._batch(part, batch))
            for factor, part in zip(self.factors, self.parts, strict=True)
        ]
        return torch.stack(losses).sum(dim=0)

    def check(self, task: str, samples: Samples, classes: int) -> None:
        """Lets every part of the sum check a task's data before a fit begins."""
        for part in self.parts:
            part.check(task, samples, classes)

    def begin(self, course: Course) -> None:
        """Lets every part of the sum prepare for a fit."""
        for part in self.parts:
            part.begin(course)

    def prepare(self, task: str, batch: Batch, predict: Predict) -> Batch:
        """Returns the batch after every part has prepared it, in their order.

        Raises:
            ConfigError: a part puts other samples into the batch, and another needs the labels or teacher of these; or it
                changes the inputs whose mean prediction a part before it took.
        """
        for part in self.parts:
            prepared = part.prepare(task, self._batch(part, batch), predict)
            if prepared.indices is not batch.indices and (batch.labels is not None or batch.teacher is not None):
                raise ConfigError(
                    f"Sum: {type(part).__name__} chooses other samples, of which the other parts have no labels or teacher",
                    todo="combine it with unlabelled objectives that are not taught",
                )
            if batch.marginal is not None and prepared.inputs is not batch.inputs:
                raise ConfigError(
                    f"Sum: {type(part).__name__} changes the inputs after their mean prediction was taken",
                    todo="put MarginalEntropy after it",
                )
            labels = prepared.labels if part.labelled or prepared.labels is not None else batch.labels
            batch = prepared._replace(labels=labels, teacher=batch.teacher)
        return batch

    def weight(self, batch: Batch) -> Tensor:
        """Returns the product of the parts' weights, ``(samples,)``."""
        weights = [part.weight(self._batch(part, batch)) for part in self.parts]
        return torch.stack(weights).prod(dim=0)

    def _batch(self, part: Objective, batch: Batch) -> Batch:
        """Returns what a part may see: no labels, and no hidden states of the teacher, that it does not declare."""
        if self.labelled and not part.labelled:
            batch = batch._replace(labels=None)
        if batch.teacher is None:
            return batch
        if not part.taught:
            return batch._replace(teacher=None)
        states = batch.teacher.hidden
        chosen = tuple(states[self.hidden.index(number)] for number in part.hidden)
        return batch._replace(teacher=batch.teacher._replace(hidden=chosen))

    def _output(self, part: Objective, output: Output) -> Output:
        """Returns the output with the hidden states that the part asked for, and no others."""
        states = output.encoded.hidden
        chosen = tuple(states[self.hidden.index(number)] for number in part.hidden)
        return Output(output.logits, replace(output.encoded, hidden=chosen))
