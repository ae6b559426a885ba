"""Comparison: several methods on one pool, beside the base, the experts and tuned task arithmetic, in one table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from adamerge.data import Calibration
from adamerge.data.corruptions import CORRUPTIONS, Corruption, check_pictures
from adamerge.errors import ConfigError
from adamerge.io.atomic import write_json
from adamerge.runs.command_line import told_apart
from adamerge.runs.comparison_figure import draw_comparison
from adamerge.runs.comparison_fits import check_fits, check_words, first_runs, fit_all, fits_of
from adamerge.runs.comparison_result import result_of
from adamerge.runs.comparison_rows import Choices, pool_words, rows_of
from adamerge.runs.comparison_scores import Scored, score_all
from adamerge.runs.comparison_table import print_table, table_of
from adamerge.runs.early_checks import made_subclass
from adamerge.runs.finished_runs import check_models, names_of, seen_too
from adamerge.runs.instantiate import Configured
from adamerge.runs.kept_scores import KeptScores
from adamerge.runs.parser import as_data, read_first
from adamerge.runs.scoring import calibrated_on, check_scored, copy_for_scores, run_copy
from adamerge.runs.table_files import write_tables
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.scorer import Scorer, told

__all__ = ["LAMBDAS", "compare", "print_table"]

LAMBDAS = [round(0.05 * step, 2) for step in range(21)]
"""Coefficients that the oracle chooses from."""


def compare(
    pool: Path,
    methods: Sequence[Path],
    folder: Path,
    overrides: Sequence[str] = (),
    lambdas: Sequence[float] | None = None,
    *,
    choices: Choices | None = None,
) -> dict[str, Any]:
    """Fits every method, scores all of them on one split, and writes tables and a figure; what is done is not repeated.

    ``task_arithmetic_tuned`` is an oracle: its coefficient is the best of 0, 0.05 ... 1 on the labels of the split.
    ``gap_closed`` is (method - tuned) / (individual - tuned), of the averages.

    Args:
        pool: what is merged.
        methods: how, each a file or a folder of stages.
        folder: of the fits, the scores and the result.
        overrides: ``--key=value``, for every fit.
        lambdas: what the oracle chooses from instead, besides 0.3; each takes a pass over all data of the split.
        choices: seeds, finished runs and what else is asked for; none of it when None.

    Returns:
        What is written to ``folder/comparison.json`` (``comparison_validation.json`` for that split): as ``result_of``
        says; the run of each row's first seed; what was asked for; rows that were skipped, and warnings that labels and
        rows of a head do not mean the same. The same table is beside it as ``.csv``, ``.md`` and ``.tex``, and ``.png``
        shows score against seconds.

    Raises:
        AdamergeError: as ``fit``; or a run is not of the pool's models.
    """
    choices = choices or Choices()
    for config in (pool, *methods):
        if not config.exists() or (config is pool and config.is_dir()):
            raise ConfigError(f"no such configuration: {config}")
    wanted = sorted({0.3, *(LAMBDAS if lambdas is None else lambdas)})
    if not all(map(math.isfinite, wanted)):
        raise ConfigError("lambdas must be finite", got=list(lambdas or ()))
    given, shared = names_of(choices.runs), told_apart(overrides)
    rows = rows_of(pool, methods, shared, choices.grid)
    settings = read_first(pool_words(pool, shared), "compare")
    tasks = list(made_subclass(Calibration, settings.data).tasks)
    fits = fits_of(rows, tasks, choices)
    check_words(fits, folder)  # all words first, then models and data
    _check_pool(settings, choices)
    check_fits(fits, folder)
    runs, left = fit_all(fits, folder)
    runs |= {name: {"": run} for name, run in given.items()}
    fit = Configured(settings)
    merged, data = fit.model.merged, fit.datamodule
    copy = copy_for_scores([merged.copy, *(run_copy(run) for own in runs.values() for run in own.values())])
    vectors, summed = _vectors(merged.task_vectors), _vectors(merged.task_vectors, choices.leave_out)
    about = {"backbone": as_data(settings)["model"]["backbone"]}

    skipped: dict[str, int] = {}

    def scored(spoiled: Corruption | None, best: float | None = None) -> Scored:
        """Returns the scores of all rows, of pictures that are spoiled so."""
        own = data if spoiled is None else data.changed(spoiled)
        scorer = Scorer(merged.backbone, own, vectors, choices.split, copy)
        kept = KeptScores(folder / "scores", scorer, {**about, "spoiled": repr(spoiled)})
        found = score_all(kept, summed, wanted, runs, best)
        skipped.update(kept.skipped)
        return found

    plain = scored(None)
    spoiled = {one.name: scored(one, plain.best) for one in (CORRUPTIONS if choices.corruptions else ())}
    result = result_of(plain, spoiled, runs, tasks, data.metric)
    told(data.skipped_lines(choices.split))
    result |= {
        "split": choices.split,
        "seeds": list(choices.seeds),
        "leave_out": list(choices.leave_out),
        "forward_passes": choices.forward_passes,
        "tuned_lambda": plain.best,
        "lambdas": wanted,
        "calibrated_on": _calibrated_on(data, choices.split, result, given),
        "skipped_rows": skipped,
        "warnings": plain.doubts,
        "runs": {name: str(run) for name, run in first_runs(runs).items()},
        "left_out": left,
    }
    _write(result, folder)
    return result


def _check_pool(settings: Namespace, choices: Choices) -> None:
    """Checks what is scored, and finished runs against it; the network is let go again, before fits make theirs.

    Raises:
        AdamergeError: there is nothing to score on, or a run is of other models.
    """
    fit = Configured(settings)
    data, vectors = fit.datamodule, fit.model.merged.task_vectors
    check_scored(fit.model.merged.backbone, data, choices.split)
    if choices.corruptions:
        check_pictures(data, choices.split)
    vectors.check()
    for run in choices.runs:
        check_models(run, vectors)


def _vectors(given: TaskVectors, without: Sequence[str] = ()) -> TaskVectors:
    """Returns the task vectors of a pool before any transform, but for those of some experts."""
    experts = {task: expert for task, expert in given.checkpoints.items() if task not in without}
    return TaskVectors(given.base, experts, include=given.include, exclude=given.exclude)


def _calibrated_on(
    data: Calibration, split: str, result: Mapping[str, Any], given: Mapping[str, Path]
) -> dict[str, Any]:
    """Returns how many scored samples are calibration data: of the pool's by task, of a finished run's by its name."""
    learned = any(row["protocol"] for name, row in result["methods"].items() if name not in given)
    found: dict[str, Any] = dict(calibrated_on(data, split)) if learned else {}
    for name, run in given.items():
        seen = seen_too(run, data, split)
        told(
            [
                f"{name}: {count} of the {split} samples of task '{task}' were calibrated on"
                for task, count in seen.items()
            ]
        )
        found |= {name: seen} if seen else {}
    return found


def _write(result: Mapping[str, Any], folder: Path) -> None:
    """Writes the result, its tables and its figure."""
    stem = folder / ("comparison" if result["split"] == "test" else f"comparison_{result['split']}")
    path = stem.with_name(f"{stem.name}.json")
    write_json(path, result)
    tables = write_tables(table_of(result), stem)
    figure = stem.with_name(f"{stem.name}.png")
    draw_comparison(result, figure)
    print(f"comparison: {path}\ntables: {', '.join(map(str, tables))}\nfigure: {figure}")
