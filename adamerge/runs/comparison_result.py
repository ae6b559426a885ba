"""Result of a comparison: means over seeds with their spread, differences with their standard errors, classes by cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adamerge.data.metrics import Metric
from adamerge.runs.comparison_scores import REFERENCES, Scored
from adamerge.runs.finished_runs import costs_of, section_of, settings_of, stages_of_run
from adamerge.training.evaluation import average, gap_closed, means, paired_step
from adamerge.training.scorer import Scores

REFERENCE = "reference"
"""Section of the rows that every comparison has."""
SMALL = 0.01
"""Share of the merged elements up to which learned scalars are few: the two classes are ranked apart."""


def result_of(
    scored: Scored,
    spoiled: Mapping[str, Scored],
    runs: Mapping[str, Mapping[str, Path]],
    tasks: Sequence[str],
    metric: Metric,
) -> dict[str, Any]:
    """Returns the rows of a comparison as plain data.

    Args:
        scored: on the split as it is.
        spoiled: under each corruption, by its name.
        runs: of each row, by seed.
        tasks: in order.
        metric: of the scores.

    Returns:
        ``tasks``, ``metric`` and ``methods``, each row with its ``section``, ``per_task`` and ``average`` (means over its
        seeds), ``spread`` (sample standard deviations over seeds; None of one), ``gap_closed``, ``to_oracle`` and
        ``to_individual`` (difference of the averages, paired standard error over samples), ``tasks_to_oracle`` and
        ``worst_task`` (likewise), ``corrupted``, and of a method ``seeds``, ``costs``, ``class``, ``protocol``, ``settings``.
    """
    oracle, experts = scored.references[REFERENCES[-1]], scored.references["individual"]
    tuned, ceiling = average(means(oracle)), average(means(experts))
    every = {name: {"": scores} for name, scores in scored.references.items()} | scored.runs
    under = {
        name: {row: {"": scores} for row, scores in one.references.items()} | one.runs for name, one in spoiled.items()
    }
    methods = {}
    for name, by_seed in every.items():
        mean = _mean(list(by_seed.values()))
        figures = {seed: means(scores) for seed, scores in by_seed.items()}
        per_task = means(mean)
        steps = {task: paired_step({task: mean[task]}, {task: oracle[task]}) for task in tasks}
        worst = min(tasks, key=lambda task: (1 if metric.higher_is_better else -1) * steps[task][0])
        corrupted = {kind: average(means(_mean(list(rows[name].values())))) for kind, rows in under.items()}
        methods[name] = {
            "per_task": per_task,
            "average": average(per_task),
            "spread": {
                "average": _spread([average(own) for own in figures.values()]),
                "per_task": {task: _spread([own[task] for own in figures.values()]) for task in tasks},
            },
            "gap_closed": gap_closed(average(per_task), tuned, ceiling),
            "to_oracle": paired_step(mean, oracle),
            "to_individual": paired_step(mean, experts),
            "tasks_to_oracle": steps,
            "worst_task": [worst, *steps[worst]],
            "corrupted": corrupted | ({"average": average(corrupted)} if corrupted else {}),
            **(_of_runs(runs[name], figures, (tuned, ceiling)) if name in runs else _of_reference(name)),
        }
    unit = {key: getattr(metric, key) for key in ("name", "unit", "factor", "higher_is_better")}
    return {"tasks": list(tasks), "metric": unit, "methods": methods}


def _of_reference(name: str) -> dict[str, Any]:
    return {"section": REFERENCE, "labels": name == REFERENCES[-1], "protocol": {}}


def _of_runs(
    runs: Mapping[str, Path], figures: Mapping[str, Mapping[str, float]], ends: tuple[float, float]
) -> dict[str, Any]:
    """Returns what is known of a method's runs: what they have seen, what they took on average, and each by its seed."""
    first = next(iter(runs.values()))
    costs = {seed: costs_of(run) for seed, run in runs.items()}
    mean = {key: _mean_of([own[key] for own in costs.values()]) for key in next(iter(costs.values()))}
    section, share = section_of(first), mean["share"]
    return {
        "section": section,
        "labels": section == "labelled",
        "class": None if share is None else "few" if share <= SMALL else "many",
        "costs": mean,
        "protocol": stages_of_run(first)[-1].get("protocol") or {},
        "settings": settings_of(first),
        "seeds": {
            seed: {
                "run": str(run),
                "per_task": dict(figures[seed]),
                "average": average(figures[seed]),
                "gap_closed": gap_closed(average(figures[seed]), *ends),
                **costs[seed],
            }
            for seed, run in runs.items()
        },
    }


def _mean(every: Sequence[Scores]) -> Scores:
    """Returns each sample's mean score over seeds, in double precision."""
    return {task: _stacked([scores[task] for scores in every]).mean(dim=0) for task in every[0]}


def _stacked(scores: Sequence[Tensor]) -> Tensor:
    return torch.stack([own.double() for own in scores])


def _spread(values: Sequence[float]) -> float | None:
    """Returns the sample standard deviation; None of a single value."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _mean_of(values: Sequence[Any]) -> Any:
    return None if any(value is None for value in values) else sum(values) / len(values)
