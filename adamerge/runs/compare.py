"""Comparison: several methods on one pool, beside the base, the experts and tuned task arithmetic, in one table."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from adamerge.data.metrics import Metric
from adamerge.errors import AdamergeError, CollapsedError, ConfigError, DivergedError
from adamerge.io.atomic import write_json
from adamerge.parametrizations import TaskWise
from adamerge.runs.command_line import Words, told_apart, words_of_fits
from adamerge.runs.config_files import stages_of
from adamerge.runs.configuration import configurations
from adamerge.runs.instantiate import Configured
from adamerge.runs.parser import read_first
from adamerge.runs.preparation import checked, validated
from adamerge.runs.run_folders import started, summary_of
from adamerge.runs.scoring import calibrated_on, check_scored, copy_for_scores, run_coefficients, run_copy, shown
from adamerge.runs.stages import fit as fit_stages
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.evaluation import average, gap_closed, means, paired_step
from adamerge.training.scorer import Scorer, Scores, told
from adamerge.training.wandb_run import grouped

REFERENCES = ("pretrained", "individual", "task_arithmetic_0.3", "task_arithmetic_tuned")
"""Rows of every comparison besides the methods asked for."""
ENDED = frozenset({"finished", "diverged", "collapsed"})
"""Statuses of a fit that has ended for good and is not run again."""
LAMBDAS = [round(0.05 * step, 2) for step in range(21)]
"""Coefficients that the oracle chooses from."""


def compare(
    pool: Path,
    methods: Sequence[Path],
    folder: Path,
    overrides: Sequence[str] = (),
    lambdas: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Fits every method (finished fits in ``folder`` are not repeated) and scores all of them on the test split.

    ``task_arithmetic_tuned`` is an oracle: its coefficient is the best of 0, 0.05 ... 1 on the TEST labels.
    ``gap_closed`` is (method - tuned) / (individual - tuned), of the averages.

    Args:
        pool: what is merged.
        methods: how, each a file or a folder of stages.
        folder: of the fits and the result.
        overrides: ``--key=value``, for every fit.
        lambdas: what the oracle chooses from instead, besides 0.3; each takes a pass over all test data.

    Returns:
        What is written to ``folder/comparison.json``: tasks, methods with per_task, average, gap_closed and labels,
        and each method's distance to the oracle and to the experts with its paired standard error; test rows that were
        skipped, and warnings that labels and rows of a head do not mean the same.

    Raises:
        AdamergeError: as ``fit``.
    """
    for config in (pool, *methods):
        if not config.exists() or (config is pool and config.is_dir()):
            raise ConfigError(f"no such configuration: {config}")
    stems = [method.stem for method in methods]
    if len(set(stems)) < len(stems):
        raise ConfigError(f"two methods have the same name: {sorted(stems)}", todo="rename one of them")
    wanted = sorted({0.3, *(LAMBDAS if lambdas is None else lambdas)})
    if not all(map(math.isfinite, wanted)):
        raise ConfigError("lambdas must be finite", got=list(lambdas or ()))
    words = words_of_fits(pool, methods, told_apart(overrides))
    _check_all(words, folder)
    runs = {}
    for method in methods:
        try:
            with grouped(folder):
                run = fitted(method, words[method], folder)
        except (CollapsedError, DivergedError) as error:
            print(f"{method.stem} is left out: {error.what}")
            continue
        status = summary_of(run).get("status")
        if status == "finished":
            runs[method.stem] = run
        else:
            print(
                f"{method.stem} is left out: {run} has {status}; adamerge fit --resume {run} goes on with what stopped"
            )
    fit = Configured(read_first(words[methods[0]]))
    merged, data = fit.model.merged, fit.datamodule
    given = merged.task_vectors
    vectors = TaskVectors(given.base, given.checkpoints, include=given.include, exclude=given.exclude)
    copy = copy_for_scores([merged.copy, *map(run_copy, runs.values())])
    scorer = Scorer(merged.backbone, data, vectors, "test", copy)
    hits: dict[str, Scores] = {"pretrained": scorer.base(), "individual": scorer.experts()}
    doubts = scorer.doubts(hits["pretrained"], hits["individual"])
    by_lambda = {value: scorer.merged(vectors, partial(TaskWise, init=value)) for value in wanted}
    best = data.metric.best({value: average(means(scores)) for value, scores in by_lambda.items()})
    hits["task_arithmetic_0.3"], hits["task_arithmetic_tuned"] = by_lambda[0.3], by_lambda[best]
    protocols: dict[str, Mapping[str, Any]] = {}
    for name, run in runs.items():
        coefficients = run_coefficients(run)
        protocols[name] = coefficients.protocol
        hits[name] = scorer.of(coefficients)
    result = _result(hits, list(data.tasks), protocols, data.metric)
    result["tuned_lambda"], result["lambdas"] = best, wanted
    result["calibrated_on"] = calibrated_on(data, "test") if any(protocols.values()) else {}
    told(data.skipped_lines("test"))
    result["skipped_rows"], result["warnings"] = data.skipped("test"), doubts
    result["runs"] = {name: str(run) for name, run in runs.items()}
    write_json(folder / "comparison.json", result)
    print(f"comparison: {folder / 'comparison.json'}")
    return result


def print_table(result: Mapping[str, Any]) -> None:
    """Prints a comparison as a table of one row per method, worst average first, the experts themselves last.

    Args:
        result: as ``compare`` returns it.
    """
    headings = ["method", *result["tasks"], "average", "gap closed", "to oracle", "labels"]
    metric = result["metric"]
    factor, sign = metric["factor"], 1 if metric["higher_is_better"] else -1
    title = f"{metric['name']} on the test split, {metric['unit']}"
    table = Table(*(Column(heading, no_wrap=True) for heading in headings), title=title)
    rows = sorted(result["methods"].items(), key=lambda item: (item[0] == "individual", sign * item[1]["average"]))
    averages = {name: row["average"] for name, row in rows}
    gap = sign * (averages["individual"] - averages["task_arithmetic_tuned"]) > 0  # else there is none to close
    for name, row in rows:
        difference, error = row["to_oracle"]
        tuned = name == "task_arithmetic_tuned"
        table.add_row(
            f"{name} ({result['tuned_lambda']})" if tuned else name,
            *(shown(row["per_task"][task], factor) for task in result["tasks"]),
            shown(row["average"], factor),
            f"{100 * row['gap_closed'] + 0.0:.0f} %" if gap else "none",
            f"{'+' if difference >= 0 else ''}{shown(difference, factor)} ± {shown(error, factor)}",
            "test labels" if tuned else "used" if row["labels"] else "no",
        )
    console = Console(width=max(Console().width, 90 + 12 * len(result["tasks"])))
    console.print(table)
    console.print(
        "gap closed: share of the way from tuned task arithmetic to the individual experts. "
        f"to oracle: {metric['unit']} over tuned task arithmetic, ± one paired standard error."
    )


def fitted(method: Path, words: Words, folder: Path) -> Path:
    """Returns the folder of the method's run in the comparison, which is fitted or resumed first unless it has ended.

    Args:
        method: which.
        words: of its fit.
        folder: of the comparison.
    """
    run = _run_of(method, words, folder)
    if summary_of(run).get("status") in ENDED:
        return run
    if started(run):
        fit_stages([], resume=run)
        return run
    fit_stages([*words.in_order, "--runs", str(folder), "--name", "fits", "--id", run.name])
    return run


def _check_all(words: Mapping[Path, Words], folder: Path) -> None:
    """Checks that every method that is still to fit can be fitted, and that there is something to score on.

    Raises:
        AdamergeError: not so; nothing has been fitted or written then.
    """
    waiting = {
        method: configurations(own, "compare")
        for method, own in words.items()
        if summary_of(_run_of(method, own, folder)).get("status") not in ENDED
    }
    looked = False
    for method, stages in waiting.items():  # all words first, then models and data
        with _named(method):
            checked(stages)
    for method, stages in waiting.items():
        with _named(method):
            fit = validated(stages)
            if not looked:  # the models and the data are the same for all
                check_scored(fit.model.merged.backbone, fit.datamodule, "test")
                fit.model.merged.task_vectors.check()
                looked = True


@contextmanager
def _named(method: Path) -> Iterator[None]:
    """Puts the name of the method in front of an error raised in the block."""
    try:
        yield
    except AdamergeError as error:
        raise error.told_of(method.name) from error


def _run_of(method: Path, words: Words, folder: Path) -> Path:
    """Returns the folder of the method's run, named after a hash of its configuration: a changed one is fitted anew."""
    given = [one for file in words.files for one in (stages_of(Path(file)) if Path(file).is_dir() else [Path(file)])]
    shared = [f"--config={file}" for file in words.files[2:]]
    recipe = [*(path.read_bytes() for path in given), *(word.encode() for word in (*shared, *words.overrides))]
    digest = hashlib.sha256(b"\0".join(recipe)).hexdigest()
    return folder / "fits" / f"{method.stem}-{digest[:8]}"


def _result(
    hits: Mapping[str, Scores], tasks: list[str], protocols: Mapping[str, Mapping[str, Any]], metric: Metric
) -> dict[str, Any]:
    averages = {name: means(scores) for name, scores in hits.items()}
    tuned, ceiling = average(averages["task_arithmetic_tuned"]), average(averages["individual"])
    methods = {
        name: {
            "per_task": per_task,
            "average": average(per_task),
            "gap_closed": gap_closed(average(per_task), tuned, ceiling),
            "labels": name == REFERENCES[-1] or _read_labels(protocols.get(name, {})),
            "protocol": protocols.get(name, {}),
            "to_oracle": paired_step(hits[name], hits["task_arithmetic_tuned"]),
            "to_individual": paired_step(hits[name], hits["individual"]),
        }
        for name, per_task in averages.items()
    }
    unit = {key: getattr(metric, key) for key in ("name", "unit", "factor", "higher_is_better")}
    return {"tasks": tasks, "metric": unit, "methods": methods}


def _read_labels(protocol: Mapping[str, Any]) -> bool:
    """Returns whether labels drove a fit, or chose its result, as its data protocol says."""
    return bool(protocol.get("labelled") or protocol.get("selection"))
