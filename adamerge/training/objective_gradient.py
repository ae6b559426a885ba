"""The objective over a step's batch, evaluated in micro-batches on the merged copy; its gradient is a second call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from adamerge.backbones import Batch, Encoded, Inputs, Output
from adamerge.backbones.inputs import count, rows
from adamerge.errors import ConfigError
from adamerge.merging.merged_model import MergedModel
from adamerge.objectives import Objective
from adamerge.training.evaluation import Spread
from adamerge.training.length_groups import grouped
from adamerge.training.strategy import Strategy


class Evaluation(NamedTuple):
    """Losses and spread of predictions for a batch of every task, over the samples of all processes.

    Attributes:
        losses: each task's weighted mean of the objective, times the task's weight; detached.
        spread: of each task's predictions.
    """

    losses: Mapping[str, Tensor]
    spread: Mapping[str, Spread]

    @property
    def total(self) -> Tensor:
        """Returns the sum of the tasks' losses, a scalar."""
        return torch.stack(list(self.losses.values())).sum()


class BatchObjective:
    """The objective over a batch of every task, with the merged copy's weights: its value, and its gradient.

    Args:
        merged: merged before either call; with grad enabled for ``backward``, whose ``G = dL/dtheta`` its ``pull_back``
            takes to the coefficients afterwards.
        objective: one loss per sample.
        task_weights: weight of a task's mean in the sum; 1 where a task is not named.
        micro_batch: samples per forward pass, of whatever task, as ``grouped`` chooses them; all at once when None.
        strategy: of the trainer: sums over processes.
    """

    def __init__(
        self,
        merged: MergedModel,
        objective: Objective,
        task_weights: Mapping[str, float | Tensor],
        micro_batch: int | None,
        strategy: Strategy,
    ) -> None:
        self.merged, self.objective, self.task_weights = merged, objective, task_weights
        self.micro_batch, self.strategy = micro_batch, strategy

    @torch.no_grad()
    def evaluate(self, batch: Mapping[str, Batch]) -> Evaluation:
        """Returns the objective's value; nothing is remembered for a gradient.

        Raises:
            ConfigError: the objective does not return one loss per sample.
        """
        return self._run(batch, lambda loss: None)

    def backward(self, batch: Mapping[str, Batch]) -> Evaluation:
        """Returns the objective's value, and adds its gradient to that of the merged copy.

        Raises:
            ConfigError: the objective does not return one loss per sample.
        """
        return self._run(batch, torch.Tensor.backward)

    def _run(self, batch: Mapping[str, Batch], send_back: Callable[[Tensor], None]) -> Evaluation:
        """Goes through the micro-batches, and hands each one's share of the loss on before the next is run."""
        groups = grouped(
            {task: self._prepared(task, part) for task, part in batch.items()}, self.micro_batch, self.merged
        )
        batch, scales = groups.batch, self._scales(groups.batch)
        device = self.merged.device
        losses = {task: torch.zeros((), device=device) for task in batch}
        spread = {task: Spread() for task in batch}
        for inputs, parts in groups.passes():
            encoded = self.merged(inputs, self.objective.hidden)
            loss = torch.zeros((), device=device)
            for task, places, samples in parts:
                own = encoded.rows(places)
                output = self.merged.backbone.output(own, task)
                per_sample = self.objective(output, batch[task].rows(samples).within(own))
                scale = scales[task][samples]
                if per_sample.shape != scale.shape:
                    raise ConfigError(
                        f"{type(self.objective).__name__} must return one loss per sample",
                        expected=tuple(scale.shape),
                        got=tuple(per_sample.shape),
                    )
                task_loss = (per_sample * scale).sum()
                losses[task] += task_loss.detach()
                spread[task].update(output.logits.detach(), output.mask)
                loss = loss + task_loss
            send_back(loss)
        return self._of_all_processes(Evaluation(losses, spread))

    def _prepared(self, task: str, part: Batch) -> Batch:
        """Returns the batch that the objective sees; of inputs that it has changed no lengths are known but its own."""
        prepared = self.objective.prepare(task, part, partial(self._predict, task))
        same = prepared.inputs is part.inputs or prepared.lengths is not part.lengths
        return prepared if same else prepared._replace(lengths=None)

    def _of_all_processes(self, own: Evaluation) -> Evaluation:
        """Returns losses and spread over all processes' samples, by one reduction; each process had its own part."""
        processes = getattr(self.strategy, "world_size", 1)
        if processes == 1:
            return own
        losses = torch.stack(list(own.losses.values())) / processes
        parts = [losses, *(spread.sums() for spread in own.spread.values())]
        sums = self.strategy.reduce(torch.cat(parts), reduce_op="sum")
        assert isinstance(sums, Tensor)
        total, *spreads = sums.split([len(part) for part in parts])
        return Evaluation(
            dict(zip(own.losses, total.unbind(), strict=True)),
            {task: Spread(part) for task, part in zip(own.spread, spreads, strict=True)},
        )

    def _scales(self, batch: Mapping[str, Batch]) -> dict[str, Tensor]:
        """Returns each sample's factor in the sum over tasks of weighted means over all processes' samples."""
        weights = {task: self.objective.weight(part) for task, part in batch.items()}
        totals = torch.stack([weight.sum() for weight in weights.values()])
        reduced = self.strategy.reduce(totals, reduce_op="sum")
        totals = reduced if isinstance(reduced, Tensor) else totals
        processes = getattr(self.strategy, "world_size", 1)  # whose gradients are averaged
        return {
            task: self.task_weights.get(task, 1.0) * weights[task] / totals[i].clamp_min(1e-12) * processes
            for i, task in enumerate(batch)
        }

    @torch.no_grad()
    def _predict(self, task: str, inputs: Inputs) -> Output:
        """Returns the merged model's output for inputs of one task, in micro-batches, without a gradient."""
        size = self.micro_batch or count(inputs)
        parts = [
            self.merged.backbone.output(self.merged(rows(inputs, slice(start, start + size))), task)
            for start in range(0, count(inputs), size)
        ]
        masks = [part.mask for part in parts if part.mask is not None]
        encoded = Encoded(torch.cat([part.features for part in parts]), mask=torch.cat(masks) if masks else None)
        return Output(torch.cat([part.logits for part in parts]), encoded)
