"""Selections: the rules by which a step's coefficients become a fit's result, by labels or without them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from adamerge.data.agreement import Agreement
from adamerge.data.metrics import Metric
from adamerge.errors import ConfigError
from adamerge.training.evaluation import average
from adamerge.training.looks import HeldOutLooks, Look, Looks, ValidationLooks


class Selection(ABC):
    """A rule that says how good a step is by its scores: on the labelled validation split, if it does not say otherwise."""

    @abstractmethod
    def value(self, look: Look) -> float | None:
        """Returns a number that is larger for a better step; None for a step that may not be chosen.

        Raises:
            ConfigError: the rule does not fit the tasks.
        """

    def looked_at(self) -> Looks:
        """Returns what is looked at in a fit, before the first look."""
        return ValidationLooks()

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


class HighestAgreement(Selection):
    """The highest mean agreement with the tasks' own experts on inputs that are held out, without labels.

    Of classes it is the share of samples for which model and expert hold the same class for the likeliest; of tokens, the
    lowest divergence. ``data.held_out`` says how many inputs no step sees. The experts run on them once before a fit, so that
    it can choose for any objective. A step at which a task has lost too much of what it began with may not be chosen.

    Args:
        fall: share of a task's agreement at the initial coefficients that a step may lose; of divergences, of the
            probability of the expert's tokens.

    Raises:
        ConfigError: fall is not within (0, 1]; in use: a task has a negative weight, or no expert of its own.
    """

    def __init__(self, fall: float = 0.5) -> None:
        if not 0 < fall <= 1:
            raise ConfigError(f"HighestAgreement: fall must be positive and at most 1, got {fall}")
        self.fall = fall

    def looked_at(self) -> Looks:
        """Returns looks at the inputs that are held out."""
        return HeldOutLooks()

    def value(self, look: Look) -> float | None:
        """Returns the mean agreement, or minus the mean divergence; None where a task lost too much."""
        if any(lost > self.fall for lost in look.lost.values()):
            return None
        mean = average(look.scores)
        return mean if look.metric.higher_is_better else -mean

    def check(self, tasks: Sequence[str], weights: Mapping[str, float]) -> None:
        """Refuses tasks that the fit moves away from: their experts are no model for it."""
        away = [task for task in tasks if weights.get(task, 1.0) < 0]
        if away:
            raise ConfigError(
                f"HighestAgreement: the fit moves away from task '{away[0]}', and agreement with its expert is no aim",
                expected="weights that are not negative",
                got=f"{weights[away[0]]} in model.task_weights",
                todo="choose by another rule, such as LowestTarget",
            )


def _ratio(metric: Metric | Agreement, value: float, reference: float) -> float:
    """Returns how good a score is beside another, 1 when it is the same: more is better whatever the metric."""
    above, below = (value, reference) if metric.higher_is_better else (reference, value)
    return above / below if below else 1.0 + above
