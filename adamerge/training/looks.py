"""Looks: the figures by which steps are compared: scores on the labelled validation split, or agreement without labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch

from adamerge.data.agreement import Agreement
from adamerge.data.metrics import Metric
from adamerge.errors import ConfigError
from adamerge.training.evaluation import means, score
from adamerge.training.held_out import fallen
from adamerge.training.module import MergingModule


class Look(NamedTuple):
    """The figures by which a selection judges a step: of the merged model, the base and the experts.

    Attributes:
        scores: of the merged model on each task's samples.
        base: of the base, on the same samples; empty of looks without labels.
        experts: of each expert on its own task; a task without one is not in it.
        weights: of the tasks in the objective; negative where the fit moves away.
        metric: whose scores these are.
        lost: share of each task's score at the initial coefficients that is gone; empty of looks with labels.
    """

    scores: Mapping[str, float]
    base: Mapping[str, float]
    experts: Mapping[str, float]
    weights: Mapping[str, float]
    metric: Metric | Agreement
    lost: Mapping[str, float] = {}


class Looks(ABC):
    """What is looked at to compare the steps of one fit.

    Attributes:
        split: what it is, for the record.
        labelled: whether labels are read.
    """

    split: ClassVar[str]
    labelled: ClassVar[bool]

    @abstractmethod
    def check(self, module: MergingModule, rule: str) -> None:
        """Refuses data that have nothing to look at, before a fit begins.

        Args:
            module: of the fit.
            rule: whose looks they are, for the error.

        Raises:
            ConfigError: they have not.
        """

    @abstractmethod
    def begin(self, module: MergingModule) -> None:
        """Finds out what each look is compared with, before the first step of a fit, or of what is left of it."""

    @abstractmethod
    def look(self, module: MergingModule) -> Look:
        """Returns the figures of the current coefficients; the network is refilled."""

    @abstractmethod
    def name(self, module: MergingModule) -> str:
        """Returns what metrics call the scores."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed fit compares with, plain data."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compares with what a checkpoint says."""
        return


class ValidationLooks(Looks):
    """Scores on each task's labelled validation split."""

    split, labelled = "validation, labels read", True

    def __init__(self) -> None:
        self._base: dict[str, float] = {}
        self._experts: dict[str, float] = {}

    def check(self, module: MergingModule, rule: str) -> None:
        """Refuses data of which a task has no labelled validation split."""
        data = module.data
        lacking = sorted(set(data.fitted) - set(data.labelled_tasks("validation")))
        if lacking:
            raise ConfigError(
                f"{rule} chooses on the validation split, and task '{lacking[0]}' has none with labels",
                todo="leave KeepBest out of trainer.callbacks: the last step is then the result",
            )

    def begin(self, module: MergingModule) -> None:
        """Scores the base and the experts, once for a fit."""
        if self._base:
            return
        merged, data = module.merged, module.data
        merged.fill(merged.task_vectors.base.__getitem__)
        self._base = self._scores(module, data.fitted)
        for task in data.fitted:
            if task in merged.task_vectors.checkpoints:
                merged.fill_expert(task)
                self._experts |= self._scores(module, [task])

    def look(self, module: MergingModule) -> Look:
        """Returns the merged model's scores."""
        with torch.no_grad():
            module.merged.merge()
        scores = self._scores(module, module.data.fitted)
        return Look(scores, self._base, self._experts, module.merging.task_weights or {}, module.data.metric)

    def name(self, module: MergingModule) -> str:
        """Returns the validation score's name."""
        return f"validation/{module.data.metric.name}"

    def state_dict(self) -> dict[str, Any]:
        """Returns the scores of base and experts."""
        return {"base": self._base, "experts": self._experts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a checkpoint's scores of base and experts."""
        self._base, self._experts = state["base"], state["experts"]

    def _scores(self, module: MergingModule, tasks: list[str]) -> dict[str, float]:
        data = module.data
        loaders = {task: data.eval_dataloader(task, "validation") for task in tasks}
        with module.trainer.precision_plugin.val_step_context():
            return means({task: score(module.merged, task, loader, data.metric) for task, loader in loaders.items()})


class HeldOutLooks(Looks):
    """Agreement with each task's own expert on the calibration inputs that are held out; labels are never read."""

    split, labelled = "held-out calibration inputs, labels never read", False

    def check(self, module: MergingModule, rule: str) -> None:
        """Refuses data that hold nothing out, and tasks without an expert to agree with."""
        data = module.data
        if not data.held_out:
            raise ConfigError(
                f"{rule} chooses on calibration inputs that no step sees, and none are held out",
                expected="a share of them",
                got="data.held_out: 0",
                todo="set data.held_out=0.1, or leave KeepBest out of trainer.callbacks",
            )
        lacking = sorted(set(data.fitted) - set(module.held_out.tasks(data)))
        if lacking:
            raise ConfigError(
                f"{rule} chooses by agreement with the experts, and task '{lacking[0]}' has none of its own",
                todo="leave KeepBest out of trainer.callbacks: the last step is then the result",
            )

    def begin(self, module: MergingModule) -> None:
        """Runs the experts on the held-out inputs."""
        module.held_out.ask_experts(module)

    def look(self, module: MergingModule) -> Look:
        """Returns the merged model's agreement with the experts, and what is lost of that of the initial coefficients."""
        agreement, now = module.data.metric.agreement, module.held_out.look(module).agreement
        first = module.held_out.first
        assert first is not None
        lost = {task: fallen(agreement, own, first.agreement[task])[0] for task, own in now.items()}
        best = dict.fromkeys(now, agreement.best)
        return Look(means(now), {}, best, module.merging.task_weights or {}, agreement, lost)

    def name(self, module: MergingModule) -> str:
        """Returns the agreement's name."""
        return f"held_out/{module.data.metric.agreement.name}"
