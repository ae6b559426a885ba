"""Batches: preprocessed samples of one task, with labels and the outputs of the task's own expert where asked for."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from adamerge.backbones.inputs import Inputs, rows
from adamerge.backbones.lengths import Lengths
from adamerge.backbones.output import Encoded

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

    def rows(self, which: slice | Tensor) -> Teacher:
        """Returns the teacher's outputs of some of the samples."""
        classes = None if self.classes is None else self.classes[which]
        return Teacher(self.logits[which], classes, tuple(states[which] for states in self.hidden))

    def within(self, encoded: Encoded) -> Teacher:
        """Returns the outputs at the positions that a pass has, of the states that it was asked for; the rest is padding."""
        logits, classes = self.logits, self.classes
        if encoded.mask is not None:
            logits = logits[:, : encoded.mask.shape[1]]
            classes = None if classes is None else classes[:, : encoded.mask.shape[1]]
        hidden = tuple(theirs[:, : ours.shape[1]] for theirs, ours in zip(self.hidden, encoded.hidden, strict=False))
        return Teacher(logits, classes, hidden)


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
        lengths: how much of the inputs is each sample's own at most, on the CPU as ``indices`` are; None where they fill the
            inputs, or where it is not known. Who changes inputs so that a sample may get longer gives None.
    """

    inputs: Inputs
    labels: Tensor | None = None
    teacher: Teacher | None = None
    indices: Tensor | None = None
    step: int = 0
    targets: Tensor | None = None
    marginal: Tensor | None = None
    agreed: Tensor | None = None
    lengths: Lengths | None = None

    def rows(self, which: slice) -> Batch:
        """Returns a batch of some of the samples, with their labels and teacher."""
        return self.chosen(which, which)

    def chosen(self, which: slice | Tensor, there: slice | Tensor) -> Batch:
        """Returns a batch of some of the samples, in any order, with their labels and teacher.

        Args:
            which: of the samples.
            there: the same on the device of the batch, so that nobody waits for it.
        """
        return Batch(
            rows(self.inputs, there),
            None if self.labels is None else self.labels[there],
            None if self.teacher is None else self.teacher.rows(there),
            None if self.indices is None else self.indices[which],
            self.step,
            None if self.targets is None else self.targets[there],
            self.marginal,
            None if self.agreed is None else self.agreed[there],
            None if self.lengths is None else {name: each[which] for name, each in self.lengths.items()},
        )

    def within(self, encoded: Encoded) -> Batch:
        """Returns the batch with labels and teacher at the positions that a pass has.

        Args:
            encoded: what the network made of a pass that these samples are in, which may have been padded less.
        """
        labels = self.labels
        if labels is not None and encoded.mask is not None:
            labels = labels[:, : encoded.mask.shape[1]]
        return self._replace(labels=labels, teacher=None if self.teacher is None else self.teacher.within(encoded))
