"""The backward pass: every task's batch through the merged copy in micro-batches, its gradients added up there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from adamerge.backbones import Batch, Encoded, Inputs, Output
from adamerge.backbones.inputs import count, join, rows
from adamerge.errors import ConfigError
from adamerge.merging.merged_model import MergedModel
from adamerge.objectives import Objective
from adamerge.training.evaluation import Spread


class BackwardPass:
    """One evaluation of the objective and its gradient ``G = dL/dtheta`` on the merged copy.

    Args:
        merged: merged with grad enabled; its ``pull_back`` takes ``G`` to the coefficients afterwards.
        objective: one loss per sample.
        task_weights: weight of a task's mean in the sum; 1 where a task is not named.
        micro_batch: samples per forward pass, of whatever task; all at once when None.
        strategy: of the trainer: sums over processes.
    """

    def __init__(
        self,
        merged: MergedModel,
        objective: Objective,
        task_weights: Mapping[str, float],
        micro_batch: int | None,
        strategy: Strategy,
    ) -> None:
        self.merged, self.objective, self.task_weights = merged, objective, task_weights
        self.micro_batch, self.strategy = micro_batch, strategy
        self.spread: dict[str, Spread] = {}

    def __call__(self, batch: Mapping[str, Batch]) -> dict[str, Tensor]:
        """Add the batch's gradients to those of the merged copy, and its predictions to ``spread``.

        Returns:
            Each task's weighted mean of the objective over all its samples, of all processes; detached.

        Raises:
            ConfigError: the objective does not return one loss per sample.
        """
        batch = {task: self.objective.prepare(task, part, partial(self._predict, task)) for task, part in batch.items()}
        scales = self._scales(batch)
        device = self.merged.device
        losses = {task: torch.zeros((), device=device) for task in batch}
        self.spread = {task: Spread() for task in batch}
        for encoded, parts in self._forward(batch):
            loss = torch.zeros((), device=device)
            for task, places, samples in parts:
                output = self.merged.backbone.output(encoded.rows(places), task)
                per_sample = self.objective(output, batch[task].rows(samples))
                scale = scales[task][samples]
                if per_sample.shape != scale.shape:
                    raise ConfigError(
                        f"{type(self.objective).__name__} must return one loss per sample",
                        expected=tuple(scale.shape),
                        got=tuple(per_sample.shape),
                    )
                task_loss = (per_sample * scale).sum()
                losses[task] += task_loss.detach()
                self.spread[task].update(output.logits.detach(), output.mask)
                loss = loss + task_loss
            loss.backward()
        return self._of_all_processes(losses)

    def _of_all_processes(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses and the spread of all processes' samples, in one reduction; each process had its own part."""
        processes = getattr(self.strategy, "world_size", 1)
        if processes == 1:
            return losses
        parts = [torch.stack(list(losses.values())) / processes, *(found.sums() for found in self.spread.values())]
        sums = self.strategy.reduce(torch.cat(parts), reduce_op="sum")
        assert isinstance(sums, Tensor)
        total, *spreads = sums.split([len(part) for part in parts])
        self.spread = {task: Spread(found) for task, found in zip(self.spread, spreads, strict=True)}
        return dict(zip(losses, total.unbind(), strict=True))

    def _scales(self, batch: Mapping[str, Batch]) -> dict[str, Tensor]:
        """Of each sample's loss in the sum over tasks of weighted means over all processes' samples."""
        weights = {task: self.objective.weight(part) for task, part in batch.items()}
        totals = torch.stack([weight.sum() for weight in weights.values()])
        reduced = self.strategy.reduce(totals, reduce_op="sum")
        totals = reduced if isinstance(reduced, Tensor) else totals
        processes = getattr(self.strategy, "world_size", 1)  # whose gradients are averaged
        return {
            task: self.task_weights.get(task, 1.0) * weights[task] / totals[i].clamp_min(1e-12) * processes
            for i, task in enumerate(batch)
        }

    def _forward(self, batch: Mapping[str, Batch]) -> Iterator[tuple[Encoded, list[tuple[str, slice, slice]]]]:
        """One micro-batch at a time, and for each task in it: its rows there, its samples in the batch."""
        inputs = join([part.inputs for part in batch.values()])
        total = count(inputs)
        size = self.micro_batch or total
        for start in range(0, total, size):
            chunk = rows(inputs, slice(start, start + size))
            parts, first = [], 0
            for task, part in batch.items():
                last = first + count(part.inputs)
                low, high = max(first, start), min(last, start + size)
                if low < high:
                    parts.append((task, slice(low - start, high - start), slice(low - first, high - first)))
                first = last
            yield self.merged(chunk, self.objective.hidden), parts

    @torch.no_grad()
    def _predict(self, task: str, inputs: Inputs) -> Output:
        """What the merged model makes of inputs of one task, in micro-batches, without a gradient."""
        size = self.micro_batch or count(inputs)
        parts = [
            self.merged.backbone.output(self.merged(rows(inputs, slice(start, start + size))), task)
            for start in range(0, count(inputs), size)
        ]
        masks = [part.mask for part in parts if part.mask is not None]
        encoded = Encoded(torch.cat([part.features for part in parts]), mask=torch.cat(masks) if masks else None)
        return Output(torch.cat([part.logits for part in parts]), encoded)
