"""Agreement: how far predictions are those of the task's own expert, sample by sample; no label has a part in it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from adamerge.backbones import Output, Teacher


class Agreement(ABC):
    """How far a model's prediction for a sample is the expert's; a task's agreement is the mean over its samples.

    The expert's prediction is a ``Teacher`` whose logits are the logarithms of its probabilities: of all classes, or of the
    largest alone, beginning with the largest.

    Attributes:
        name: as in metrics and summaries.
        best: of a model that predicts what the expert does.
        higher_is_better: which way is up.
    """

    name: str
    best: float
    higher_is_better: bool

    @abstractmethod
    def __call__(self, output: Output, expert: Teacher) -> Tensor:
        """Returns the agreement of each sample, ``(samples,)``."""

    @abstractmethod
    def left(self, now: float, before: float) -> float:
        """Returns the share of an earlier agreement that is left: 1 where nothing has changed, 0 where nothing is."""


class SameClass(Agreement):
    """1 where model and expert hold the same class for the likeliest, else 0."""

    name, best, higher_is_better = "agreement", 1.0, True

    def __call__(self, output: Output, expert: Teacher) -> Tensor:
        """Compares logits ``(samples, classes)`` with the expert's."""
        theirs = expert.logits.argmax(dim=-1, keepdim=True)
        if expert.classes is not None:
            theirs = expert.classes.long().gather(-1, theirs)
        return (output.logits.argmax(dim=-1) == theirs[..., 0]).float()

    def left(self, now: float, before: float) -> float:
        """Returns the share of the samples that the model shared with its expert before and shares now."""
        return now / before if before else 1.0


class Divergence(Agreement):
    """``KL(p_expert || p)`` in nats, a mean over the positions that count; 0 where model and expert predict the same.

    Where the expert's ``k`` likeliest classes alone are known, all others count as one: the divergence of these ``k + 1``
    classes, which is never more than that of all. A model that leaves the expert's classes for others is seen.
    """

    name, best, higher_is_better = "divergence", 0.0, False

    def __call__(self, output: Output, expert: Teacher) -> Tensor:
        """Compares logits ``(samples, [positions,] classes)`` with the expert's, whose positions are the task's own."""
        theirs = expert.logits.float()
        ours = output.cropped(theirs.shape[1]).float().log_softmax(dim=-1)
        if expert.classes is not None:
            ours = ours.gather(-1, expert.classes.long())
        p, q = theirs.exp(), ours.exp()
        divergence = torch.where(p > 0, p * (theirs - ours), 0.0).sum(dim=-1)  # 0 log 0 is 0
        if expert.classes is not None:
            # what rounding leaves of nothing is no share; nor is a logarithm of it asked for
            rest, of_ours = ((1 - each.sum(dim=-1)).clamp_min(torch.finfo(torch.float32).eps) for each in (p, q))
            divergence = divergence + rest * (rest / of_ours).log()
        return output.mean(divergence)

    def left(self, now: float, before: float) -> float:
        """Returns ``exp(before - now)``: the factor by which the probability of the expert's words has become less."""
        return math.exp(min(before - now, 700.0))
