"""Marginal entropy: the predictions of a batch, taken together, should be spread over all classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributed

from adamerge.backbones import Batch, Output
from adamerge.errors import DataError
from adamerge.objectives.base import Objective, Predict


class MarginalEntropy(Objective):
    """Negative entropy of the mean prediction, in nats: ``-H(q) = sum_c q_c log q_c``, ``q = mean_i softmax(logits_i)``.

    Descending it spreads the mean prediction of a task's batch over the classes; a model that predicts one class for every
    sample is worst, with 0, and an even mean is best, with ``-log(classes)``. With entropy it is information maximisation,
    ``Sum([Entropy(), MarginalEntropy()])``: each prediction sure, all of them together even.

    The entropy of a mean is no mean over samples. ``prepare`` therefore predicts the whole batch once without a gradient,
    over all processes, and a sample's loss is ``sum_c p_c log q_c`` with that ``q`` held constant. The mean over samples is
    the formula's value, and its gradient is the formula's too, since ``sum_c (log q_c + 1) dq_c = sum_c log q_c dq_c``:
    the entries of ``q`` sum to 1. So micro-batches and processes change nothing, and a step costs one more forward pass,
    whose logits of all of the task's samples on this process are in memory at once.

    Where every position gets a prediction, a sample's is the mean over the positions that count. In a sum with an objective
    that weighs samples, ``q`` is of all samples, whatever they weigh.

    Args:
        normalise: divide by ``log(classes)``, so that tasks with many classes do not dominate the sum over tasks.

    Reference: SHOT (Liang et al., 2020), https://arxiv.org/abs/2002.08546, L_div.
    """

    def __init__(self, normalise: bool = False) -> None:
        super().__init__()
        self.normalise = normalise

    def prepare(self, task: str, batch: Batch, predict: Predict) -> Batch:
        """Returns the batch with the mean prediction of all its samples, over all processes."""
        output = predict(batch.inputs)
        p = output.logits.float().softmax(dim=-1)
        if output.mask is not None:
            counts = output.mask.float() / output.mask.sum(dim=1, keepdim=True).clamp_min(1)
            p = (counts.unsqueeze(-1) * p).sum(dim=1)
        total = p.sum(dim=0)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(total)
        return batch._replace(marginal=total / total.sum())

    def forward(self, output: Output, batch: Batch) -> Tensor:
        """Returns ``sum_c p_c log q_c`` of each sample: logits ``(samples, [positions,] classes)`` to ``(samples,)``.

        Raises:
            DataError: ``prepare`` has not seen the batch.
        """
        if batch.marginal is None:
            raise DataError("MarginalEntropy: the batch has no mean prediction", todo="let prepare() see it first")
        logs = batch.marginal.clamp_min(torch.finfo(torch.float32).tiny).log()  # where q is 0, so is p
        values = (output.logits.float().softmax(dim=-1) * logs).sum(dim=-1)
        return output.mean(values / math.log(max(output.logits.shape[-1], 2)) if self.normalise else values)
