"""Held-out looks: what the merged model makes of inputs that no step sees, beside what each task's expert makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from adamerge.backbones import Output, Teacher
from adamerge.backbones.inputs import moved, stack
from adamerge.data import Calibration
from adamerge.data.agreement import Agreement
from adamerge.data.held_out import HELD_OUT
from adamerge.data.teacher_outputs import narrowed
from adamerge.errors import ConfigError
from adamerge.merging.merged_model import MergedModel
from adamerge.training.evaluation import Spread, average, means
from adamerge.training.length_groups import by_length

if TYPE_CHECKING:
    from adamerge.training.module import MergingModule

TOP = 128
"""Likeliest classes of the expert's whose probabilities are kept, for each prediction: of a vocabulary a thousandth."""


class HeldOutLook(NamedTuple):
    """Predictions for each task's held-out inputs, without labels.

    Attributes:
        agreement: with the task's own expert, of each sample, ``(samples,)`` on the CPU.
        marginal_entropy: of the mean prediction, divided by ``log(classes)``.
        top_class_share: of the predictions that the most frequent class takes.
    """

    agreement: Mapping[str, Tensor]
    marginal_entropy: Mapping[str, float]
    top_class_share: Mapping[str, float]

    def figures(self, name: str) -> dict[str, float]:
        """Returns what is logged of a look, by its name in metrics; ``name`` is that of the agreement."""
        scores = means(self.agreement)
        return {
            f"held_out/{name}": average(scores),
            **{f"held_out/{name}/{task}": value for task, value in scores.items()},
            **{f"held_out/marginal_entropy/{task}": value for task, value in self.marginal_entropy.items()},
            **{f"held_out/top_class_share/{task}": value for task, value in self.top_class_share.items()},
        }


class HeldOut:
    """Looks at the held-out inputs of the tasks of a fit that have an expert of their own.

    Each expert is run on them once, before the first look of a fit, whatever drives the fit. All looks run the same batches
    in the same order; the figures are those of the first process in all. Who asks twice at one step is told the same.

    Args:
        merged: the merged model, whose network the experts use too.
        micro_batch: samples per forward pass; as many as a step has of a task when None.

    Attributes:
        first: the look at the initial coefficients.
        experts: what the experts make of the inputs themselves.
    """

    def __init__(self, merged: MergedModel, micro_batch: int | None) -> None:
        self._merged, self._micro_batch = merged, micro_batch
        self.begin()

    def begin(self) -> None:
        """Forgets the looks of an earlier fit."""
        self.first: HeldOutLook | None = None
        self.experts: HeldOutLook | None = None
        self._predicted: dict[str, list[Teacher]] = {}
        self._last: tuple[int, HeldOutLook] | None = None

    def tasks(self, data: Calibration) -> list[str]:
        """Returns the names of the tasks that can be looked at; none where the data hold nothing out."""
        own = self._merged.task_vectors.checkpoints
        return [task for task in data.fitted if task in own] if data.held_out else []

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed fit cannot see any more: the look at the initial coefficients, as plain data."""
        return {} if self.first is None else {"first": [dict(part) for part in self.first]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a fit's first look."""
        self.first = HeldOutLook(*state["first"]) if "first" in state else None

    @torch.no_grad()
    def look(self, module: MergingModule) -> HeldOutLook:
        """Looks at what the current coefficients make of the inputs, and logs the figures.

        Returns:
            The look, the same in all processes.

        Raises:
            ConfigError: the data hold nothing out.
        """
        if self._last is not None and self._last[0] == module.global_step:
            return self._last[1]
        self.ask_experts(module)
        self._merged.merge()
        agreement, spread = {}, {}
        for task, predicted in self._predicted.items():
            order, spread[task] = self._order(module, task), Spread()
            outputs = self._outputs(module, task, order)
            own = []
            for output, expert in zip(outputs, predicted, strict=True):
                own.append(module.data.metric.agreement(output, _placed(expert, self._merged.device)))
                spread[task].update(output.logits, output.mask)
            agreement[task] = torch.cat(own).cpu()[order.argsort()]
        look = module.trainer.strategy.broadcast(_look(agreement, spread))
        self._last = module.global_step, look
        self.first = look if self.first is None else self.first
        for logger in module.trainer.loggers if module.trainer.is_global_zero else ():
            # in the row of the step that was done last, as Lightning numbers them
            logger.log_metrics(look.figures(module.data.metric.agreement.name), max(module.global_step - 1, 0))
        return look

    @torch.no_grad()
    def ask_experts(self, module: MergingModule) -> None:
        """Runs each task's own expert on its held-out inputs, once in a fit; the network may be filled with one afterwards.

        Raises:
            ConfigError: the data hold nothing out.
        """
        if self.experts is not None:
            return
        data, spread, agreement = module.data, {}, {}
        if not data.held_out:
            raise ConfigError("there are no held-out inputs to look at", expected="data.held_out above 0", got=0)
        for task in self.tasks(data):
            self._merged.fill_expert(task)
            self._predicted[task], spread[task], own = [], Spread(), []
            order = self._order(module, task)
            for output in self._outputs(module, task, order):
                logits, classes = narrowed(output.logits.float().log_softmax(dim=-1), TOP, None)
                expert = Teacher(logits, classes)
                own.append(data.metric.agreement(output, expert))
                spread[task].update(output.logits, output.mask)
                self._predicted[task].append(_placed(expert, torch.device("cpu")))
            agreement[task] = torch.cat(own).cpu()[order.argsort()]
        self.experts = module.trainer.strategy.broadcast(_look(agreement, spread))

    def _order(self, module: MergingModule, task: str) -> Tensor:
        """Returns the numbers of a task's held-out inputs in the order in which they run: those of like length together."""
        samples = module.data.samples(task, HELD_OUT)
        return torch.tensor(by_length(range(len(samples)), samples)[0])

    def _outputs(self, module: MergingModule, task: str, order: Tensor) -> Iterator[Output]:
        """Yields what the network as it is filled makes of a task's held-out inputs, batch by batch, in this order."""
        samples, size = module.data.samples(task, HELD_OUT), self._micro_batch or module.data.batch_size
        for numbers in order.split(size):
            inputs = stack([samples[number] for number in numbers.tolist()])
            with module.trainer.precision_plugin.val_step_context():
                yield self._merged.backbone.output(self._merged(moved(inputs, self._merged.device)), task)


def fallen(agreement: Agreement, now: Tensor, before: Tensor) -> tuple[float, float]:
    """Returns how far a task's agreement has fallen since an earlier look at the same inputs.

    Args:
        agreement: of which these are.
        now: of each sample, ``(samples,)``.
        before: likewise.

    Returns:
        The share of the earlier agreement that is gone, and by how many paired standard errors of its mean it is worse.
    """
    worse = (before - now if agreement.higher_is_better else now - before).double()
    error = worse.std() / len(worse) ** 0.5 if len(worse) > 1 else torch.zeros(())
    sure = float(worse.mean() / error.clamp_min(torch.finfo(torch.float32).tiny))
    return 1 - agreement.left(float(now.double().mean()), float(before.double().mean())), sure


def _look(agreement: Mapping[str, Tensor], spread: Mapping[str, Spread]) -> HeldOutLook:
    return HeldOutLook(
        agreement,
        {task: float(own.marginal_entropy()) for task, own in spread.items()},
        {task: float(own.top_class_share()) for task, own in spread.items()},
    )


def _placed(expert: Teacher, device: torch.device) -> Teacher:
    classes = None if expert.classes is None else expert.classes.to(device)
    return Teacher(expert.logits.to(device), classes)
