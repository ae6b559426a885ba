"""Confusions: which class is taken for which, and signs in it that a head's rows and the labels do not mean the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from adamerge.backbones import Output
from adamerge.data.metrics import Accuracy, Metric

FAR = 0.05
"""An expert that is worse than the base by more, in shares or nats, is far below it."""
ERRORS = 3
"""Paired standard errors that the difference must be, too."""
CHANCE = 4
"""Standard deviations of a count, from which a gain is more than chance: of 80,000 pairs of 400 classes two go so far."""


class Confusions(Accuracy):
    """Accuracy that also counts what each class is taken for.

    Attributes:
        counts: samples by label and predicted class, ``(classes, classes)``; None before the first.
    """

    def __init__(self) -> None:
        self.counts: Tensor | None = None

    def __call__(self, output: Output, labels: Tensor) -> Tensor:
        """Returns hits ``(samples,)`` of logits ``(samples, classes)`` and classes ``(samples,)``; counts on CPU."""
        predicted, classes = output.logits.argmax(dim=-1), output.logits.shape[-1]
        cells = (labels * classes + predicted)[labels < classes].cpu()
        counts = torch.bincount(cells, minlength=classes**2).view(classes, classes)
        self.counts = counts if self.counts is None else self.counts + counts
        return super().__call__(output, labels)


def exchanged(counts: Tensor) -> tuple[int, int, int] | None:
    """Returns the two classes whose exchange would make most more samples right, and how many; None where it is chance.

    Exchanging the head's rows a and b makes ``n_ab + n_ba`` samples right and ``n_aa + n_bb`` wrong, where ``n_ij`` is the
    number of samples of class i that are taken for j. The gain must be above ``CHANCE * sqrt`` of the sum of the four, and
    neither class may lose: where a model takes all for one class, that one would.

    Args:
        counts: ``(classes, classes)``, by label and predicted class.
    """
    there = counts.double()
    right = there.diagonal()
    own = there - right[:, None]  # what class i gains when its row is exchanged with that of j
    loses = own < -2 * (there + right[:, None]).sqrt()
    gain = own + own.T
    clear = gain > CHANCE * (there + there.T + right[:, None] + right[None, :]).sqrt()
    gain = torch.where(clear & ~loses & ~loses.T, gain, 0.0).triu(1)
    best = int(gain.argmax())
    a, b = divmod(best, len(counts))
    return (a, b, int(gain[a, b])) if gain[a, b] > 0 else None


def exchanged_lines(counts: Mapping[str, Tensor], classnames: Mapping[str, Sequence[str]], who: str) -> Iterator[str]:
    """Yields a line for each task in which exchanging two classes would gain much.

    Args:
        counts: of each task, ``(classes, classes)``.
        classnames: of each task, in label order.
        who: the model that took them so, for people.
    """
    for task, there in counts.items():
        exchange = exchanged(there)
        if exchange is not None:
            a, b, gain = exchange
            total, right = int(there.sum()), int(there.diagonal().sum())
            names = [f"'{classnames[task][i]}'" if i < len(classnames[task]) else str(i) for i in (a, b)]
            yield (
                f"task '{task}': labels and rows of the head seem to mean other classes: {who} is right on "
                f"{100 * right / total:.1f} % of {total} samples, and with {names[0]} (label {a}) and {names[1]} (label {b}) "
                f"exchanged on {100 * (right + gain) / total:.1f} %. Compare classnames with what the expert was trained on"
            )


def far_below_lines(base: Mapping[str, Tensor], experts: Mapping[str, Tensor], metric: Metric) -> Iterator[str]:
    """Yields a line for each task whose expert is far below the base: by more than ``FAR`` and ``ERRORS`` standard errors.

    Args:
        base: of each task, the score of each sample.
        experts: the same of the task's own expert; other tasks lack.
        metric: of the scores.
    """
    for task, scores in experts.items():
        worse = (base[task] - scores).double() * (1 if metric.higher_is_better else -1)
        error = float(worse.std()) / math.sqrt(len(worse)) if len(worse) > 1 else math.inf
        if float(worse.mean()) > max(FAR, ERRORS * error):
            values = [metric.factor * float(score.double().mean()) for score in (scores, base[task])]
            yield (
                f"task '{task}': its own expert is far below the base, {metric.name} {values[0]:.3g} against {values[1]:.3g} "
                f"{metric.unit}: is it the expert of this task, and do labels and rows of its head mean the same?"
            )
