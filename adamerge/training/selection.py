"""Selection: the labelled validation split decides which step's coefficients are a fit's result; else the last's."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer

from adamerge.data.metrics import Metric
from adamerge.errors import ConfigError
from adamerge.merging.merged_model import MergedModel
from adamerge.training.evaluation import average, means, score
from adamerge.training.module import MergingModule
from adamerge.training.result import Chooser


class Look(NamedTuple):
    """The scores by which a selection judges a step: of the merged model, the base and the experts.

    Attributes:
        scores: of the merged model on each task's validation split.
        base: of the base, on the same samples.
        experts: of each expert on its own task; a task without one is not in it.
        weights: of the tasks in the objective; negative where the fit moves away.
        metric: whose scores these are.
    """

    scores: Mapping[str, float]
    base: Mapping[str, float]
    experts: Mapping[str, float]
    weights: Mapping[str, float]
    metric: Metric


class Selection(ABC):
    """A rule that says how good a step is by its scores."""

    @abstractmethod
    def value(self, look: Look) -> float | None:
        """Returns a number that is larger for a better step; None for a step that may not be chosen.

        Raises:
            ConfigError: the rule does not fit the tasks.
        """

    def check(self, tasks: Sequence[str], weights: Mapping[str, float]) -> None:
        """Checks whether the rule fits the tasks that are fitted and their weights, before a fit begins.

        Raises:
            ConfigError: it does not.
        """
        return


class HighestScore(Selection):
    """The highest mean over tasks of the score divided by that of the task's expert, or the base's where there is none.

    Reference: aTLAS (Zhang et al., 2024), https://arxiv.org/abs/2407.02880, section 5: task addition.
    """

    def value(self, look: Look) -> float:
        """Returns the mean of the normalised scores; where less is better, of their inverses."""
        references = {**look.base, **look.experts}
        return average({task: _ratio(look.metric, value, references[task]) for task, value in look.scores.items()})


class LowestTarget(Selection):
    """The worst mean score on the tasks of negative weight, among steps that leave every other task most of the base's.

    Args:
        share: of the base's score that each of the other tasks, the controls, must keep.

    Raises:
        ConfigError: share is not within (0, 1]; in use: no task has a negative weight, or all have.

    Reference: aTLAS (Zhang et al., 2024), https://arxiv.org/abs/2407.02880, section 5: task negation.
    """

    def __init__(self, share: float = 0.95) -> None:
        if not 0 < share <= 1:
            raise ConfigError(f"LowestTarget: share must be positive and at most 1, got {share}")
        self.share = share

    def value(self, look: Look) -> float | None:
        """Returns minus the targets' mean score, normalised by the base's; None where a control lost too much."""
        self.check(list(look.scores), look.weights)
        targets = [task for task in look.scores if look.weights.get(task, 1.0) < 0]
        controls = [task for task in look.scores if task not in targets]
        kept = {task: _ratio(look.metric, look.scores[task], look.base[task]) for task in look.scores}
        if any(kept[task] < self.share for task in controls):
            return None
        return -average({task: kept[task] for task in targets})

    def check(self, tasks: Sequence[str], weights: Mapping[str, float]) -> None:
        """Refuses tasks of which none has a negative weight, or all have."""
        if len({weights.get(task, 1.0) < 0 for task in tasks}) != 2:
            raise ConfigError(
                "LowestTarget needs a task to forget and a task to keep",
                expected="a negative weight in model.task_weights for some tasks, not for all",
                got=f"weights {dict(weights)} of tasks {list(tasks)}",
            )


def _ratio(metric: Metric, value: float, reference: float) -> float:
    """Returns how good a score is beside another, 1 when it is the same: more is better whatever the metric."""
    above, below = (value, reference) if metric.higher_is_better else (reference, value)
    return above / below if below else 1.0 + above


class KeepBest(Callback, Chooser):
    """Looks at the validation split now and then, and lets the best step's coefficients be the fit's result.

    It looks before the first step, so that a fit never ends worse than it began, after each ``every`` steps and after the
    last. The coefficient file and ``summary.json`` say which step was chosen, on which split, and that its labels were read.

    Args:
        selection: what is best; of equals, the earliest.
        every: steps between two looks.

    Raises:
        ConfigError: every is below 1; in use: a task has no labelled validation split.
    """

    def __init__(self, selection: Selection, every: int = 10) -> None:
        if every < 1:
            raise ConfigError(f"KeepBest: every must be at least 1, got {every}")
        self.selection, self.every = selection, every
        self._base: dict[str, float] = {}
        self._experts: dict[str, float] = {}
        self._best: dict[str, Any] = {}
        self._values: dict[str, torch.Tensor] = {}
        self._looks = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets the looks of an earlier fit, and refuses data without a labelled validation split."""
        if stage == "fit":
            self._base, self._experts, self._best, self._values, self._looks = {}, {}, {}, {}, 0
            data, weights = _merging(pl_module).data, _merging(pl_module).merging.task_weights or {}
            lacking = sorted(set(data.fitted) - set(data.labelled_tasks("validation")))
            if lacking:
                raise ConfigError(
                    f"{type(self.selection).__name__} chooses on the validation split, and task '{lacking[0]}' has none "
                    "with labels",
                    todo="leave KeepBest out of trainer.callbacks: the last step is then the result",
                )
            self.selection.check(data.fitted, weights)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs: the best step so far, its coefficients, and the scores to compare with."""
        return {
            "base": self._base,
            "experts": self._experts,
            "best": self._best,
            "values": self._values,
            "looks": self._looks,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with the best step that a checkpoint holds."""
        self._base, self._experts = state_dict["base"], state_dict["experts"]
        self._best, self._values, self._looks = state_dict["best"], state_dict["values"], state_dict["looks"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scores base and experts, and the coefficients that the fit starts from."""
        if self._looks == 0:
            module = _merging(pl_module)
            merged, data = module.merged, module.data
            merged.fill(merged.task_vectors.base.__getitem__)
            self._base = self._scores(module, data.fitted)
            for task in data.fitted:
                if task in merged.task_vectors.checkpoints:
                    merged.fill_expert(task)
                    self._experts |= self._scores(module, [task])
            self._look(_merging(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Scores the step before its checkpoint is written, so that a resumed run chooses among the same steps."""
        if trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self._look(_merging(pl_module))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Makes the best step so far the result of a fit that ends early, too."""
        if isinstance(pl_module, MergingModule):
            pl_module.result.choose(trainer)

    def choose(self, merged: MergedModel) -> dict[str, Any]:
        """Puts the best step's coefficients in place; where no step may be chosen, the last one's stand."""
        if not self._looks:
            return {}
        if not self._best:
            warnings.warn(f"{type(self.selection).__name__}: no step may be chosen; the last one stands", stacklevel=2)
        else:
            merged.parametrization.load_state_dict(self._values)
        return {
            "rule": type(self.selection).__name__,
            "split": "validation, labels read",
            "looks": self._looks,
            **(self._best or {"step": None}),
        }

    def _look(self, module: MergingModule) -> None:
        data, weights = module.data, module.merging.task_weights or {}
        with torch.no_grad():
            module.merged.merge()
        scores = self._scores(module, data.fitted)
        value = self.selection.value(Look(scores, self._base, self._experts, weights, data.metric))
        self._looks += 1
        if value is not None and math.isfinite(value) and (not self._best or value > self._best["value"]):
            self._best = {"step": module.global_step, "value": value, "scores": scores}
            state = module.merged.parametrization.state_dict()
            self._values = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}

    def _scores(self, module: MergingModule, tasks: list[str]) -> dict[str, float]:
        data = module.data
        loaders = {task: data.eval_dataloader(task, "validation") for task in tasks}
        with module.trainer.precision_plugin.val_step_context():
            return means({task: score(module.merged, task, loader, data.metric) for task, loader in loaders.items()})


def _merging(module: LightningModule) -> MergingModule:
    if not isinstance(module, MergingModule):
        raise ConfigError(
            "KeepBest chooses among merging coefficients", expected="a MergingModule", got=type(module).__name__
        )
    return module
