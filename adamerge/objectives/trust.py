"""Trust: which unlabelled samples a model is sure enough of to be taken at its word, chosen evenly over the classes."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

UNTRUSTED = -1


class Trust(ABC):
    """Chooses, from the predictions for all samples of a task, those whose class is trusted."""

    @abstractmethod
    def __call__(self, p: Tensor, most: int) -> Tensor:
        """Returns the trusted class of each sample, -1 where it is not trusted: int64 ``(samples,)``.

        Args:
            p: probabilities ``(samples, classes)``, fp32.
            most: samples per class.
        """


class SurestOfAll(Trust):
    """Trusts, for each class c, the ``most`` samples of largest ``p_c`` among ALL samples, whatever they are predicted as.

    A sample that is among the first of several classes goes to the one that gives it the largest probability. Of samples
    whose ``p_c`` are equal, those of lower number come first.

    Reference: aTLAS (Zhang et al., 2024), https://arxiv.org/abs/2407.02880, appendix E.
    """

    def __call__(self, p: Tensor, most: int) -> Tensor:
        """Returns the class for which a sample is among the surest of all samples, -1 for none: ``(samples,)``."""
        first = p.argsort(dim=0, descending=True, stable=True)[:most]
        among_first = torch.zeros_like(p, dtype=torch.bool).scatter_(0, first, True)
        best, label = p.masked_fill(~among_first, -1.0).max(dim=1)
        return torch.where(best >= 0, label, UNTRUSTED)


class SurestOfPredicted(Trust):
    """Trusts, for each class c, the ``most`` samples of largest ``p_c`` among those that are predicted as c.

    A class that is predicted for fewer samples gets fewer: not the paper's choice, and no longer even over the classes.
    """

    def __call__(self, p: Tensor, most: int) -> Tensor:
        """Returns the predicted class of the samples that are surest of it, -1 for the others: ``(samples,)``."""
        confidence, label = p.max(dim=1)
        order = torch.argsort(confidence, descending=True, stable=True)
        order = order[label[order].argsort(stable=True)]  # class after class, in each the surest first
        ordered = label[order]
        firsts = torch.searchsorted(ordered, torch.arange(p.shape[1], device=p.device))
        places = torch.arange(len(order), device=p.device) - firsts[ordered]
        return torch.empty_like(label).scatter_(0, order, torch.where(places < most, ordered, UNTRUSTED))
