"""Batches: preprocessed samples of one task, with labels and the outputs of the task's own expert where asked for."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from adamerge.backbones.inputs import Inputs, rows

IGNORED = -100
"""Label of a position that does not count."""


class Teacher(NamedTuple):
    """Outputs of a task's own expert for the samples of a batch; constant during a fit.

    Attributes:
        logits: ``(samples, [positions,] classes)``, or the largest ``k`` of them.
        classes: which classes these are, ``(samples, [positions,] k)``; None for all, in order.
        hidden: the chosen hidden states, each ``(samples, positions, width)``.
    """

    logits: Tensor
    classes: Tensor | None = None
    hidden: tuple[Tensor, ...] = ()

    def rows(self, which: slice) -> Teacher:
        """Returns the teacher's outputs of some of the samples."""
        classes = None if self.classes is None else self.classes[which]
        return Teacher(self.logits[which], classes, tuple(states[which] for states in self.hidden))


class Batch(NamedTuple):
    """Samples of one task: preprocessed inputs, with labels and teacher where an objective asks for them.

    Attributes:
        inputs: preprocessed, ``(samples, ...)``.
        labels: ``(samples,)`` classes or ``(samples, positions)`` tokens, ``IGNORED`` where nothing is to be predicted;
            None for objectives that are not labelled, so that labels cannot reach them.
        teacher: for objectives that declare it.
        indices: ``(samples,)``, the samples' numbers in their split; on the CPU wherever the rest is, so that nobody who
            reads samples by them waits for a device.
        step: number of the step they are drawn for.
        targets: ``(samples, classes)``, probabilities that an objective set itself, from predictions, when it prepared
            the batch.
        marginal: ``(classes,)``, the mean prediction of all of the step's samples of this task, of all processes, that an
            objective set in the same way; the same for any of the samples.
        agreed: ``(samples,)``, whether model and expert predict the same class, that an objective set in the same way.
    """

    inputs: Inputs
    labels: Tensor | None = None
    teacher: Teacher | None = None
    indices: Tensor | None = None
    step: int = 0
    targets: Tensor | None = None
    marginal: Tensor | None = None
    agreed: Tensor | None = None

    def rows(self, which: slice) -> Batch:
        """Returns a batch of some of the samples, with their labels and teacher."""
        return Batch(
            rows(self.inputs, which),
            None if self.labels is None else self.labels[which],
            None if self.teacher is None else self.teacher.rows(which),
            None if self.indices is None else self.indices[which],
            self.step,
            None if self.targets is None else self.targets[which],
            self.marginal,
            None if self.agreed is None else self.agreed[which],
        )
