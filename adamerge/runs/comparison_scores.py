"""Scores of a comparison: references and runs on one split, as it is and spoiled, with one network and none of them twice."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from adamerge.io.run_folder import COEFFICIENTS
from adamerge.parametrizations import TaskWise
from adamerge.runs.kept_scores import KeptScores
from adamerge.runs.scoring import run_coefficients
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.evaluation import average, means
from adamerge.training.scorer import Scores

REFERENCES = ("pretrained", "individual", "task_arithmetic_0.3", "task_arithmetic_tuned")
"""Rows of every comparison besides the methods asked for."""


@dataclass
class Scored:
    """The scores of every row on the same samples.

    Attributes:
        references: of the base, the experts and task arithmetic, by name.
        runs: of each row's runs, by seed.
        best: coefficient of the tuned task arithmetic.
        doubts: signs that labels and rows of a head do not mean the same.
    """

    references: dict[str, Scores] = field(default_factory=dict)
    runs: dict[str, dict[str, Scores]] = field(default_factory=dict)
    best: float = 0.3
    doubts: list[str] = field(default_factory=list)


def score_all(
    kept: KeptScores,
    vectors: TaskVectors,
    lambdas: Sequence[float],
    runs: Mapping[str, Mapping[str, Path]],
    best: float | None = None,
) -> Scored:
    """Scores references and runs; what has been scored before is read.

    Args:
        kept: with the scorer, whose task vectors are those of all experts.
        vectors: that task arithmetic sums; the same without the experts that are left out.
        lambdas: its coefficients to choose from by the labels of the split, 0.3 among them.
        runs: finished, by row and seed.
        best: the coefficient that was chosen already, on inputs that were not spoiled; of these alone it is scored then.
    """
    scorer = kept.scorer
    models = scorer.vectors.fingerprints() | _names(scorer.vectors)
    found = Scored()
    found.references["pretrained"] = kept.of({"base": models}, scorer.base)
    found.references["individual"] = kept.of({"experts": models}, scorer.experts)
    found.doubts = scorer.doubts(found.references["pretrained"], found.references["individual"])
    summed = vectors.fingerprints() | _names(vectors)
    by_lambda = {
        value: kept.of(
            {"sum": summed, "coefficient": value}, partial(scorer.merged, vectors, partial(TaskWise, init=value))
        )
        for value in (lambdas if best is None else {0.3, best})
    }
    averages = {value: average(means(scores)) for value, scores in by_lambda.items()}
    found.best = scorer.data.metric.best(averages) if best is None else best
    found.references |= {"task_arithmetic_0.3": by_lambda[0.3], "task_arithmetic_tuned": by_lambda[found.best]}
    for row, own in runs.items():
        for seed, run in own.items():
            digest = hashlib.sha256((run / COEFFICIENTS).read_bytes()).hexdigest()
            found.runs.setdefault(row, {})[seed] = kept.of(
                {"coefficients": digest},
                lambda run=run: scorer.of(run_coefficients(run)),  # type: ignore[misc]
            )
    return found


def _names(vectors: TaskVectors) -> dict[str, Any]:
    return {"include": list(vectors.include), "exclude": list(vectors.exclude)}
