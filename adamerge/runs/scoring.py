"""Scoring: a run's merged model, the base and the experts on labelled data, one process and one network for all."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from adamerge.artifacts.coefficients import Coefficients, load_coefficients
from adamerge.artifacts.recipe import build
from adamerge.backbones import Backbone
from adamerge.data import Calibration
from adamerge.data.metrics import Metric
from adamerge.data.overlap import overlap
from adamerge.errors import ConfigError
from adamerge.io.atomic import write_json
from adamerge.io.run_folder import COEFFICIENTS
from adamerge.io.untrusted_files import read_json
from adamerge.merging.copies import Copy, WholeCopy
from adamerge.runs.command_line import Words
from adamerge.runs.config_files import read_config
from adamerge.runs.instantiate import Configured
from adamerge.runs.parser import read_first
from adamerge.training.confusions import exchanged_lines
from adamerge.training.evaluation import average, means
from adamerge.training.scorer import Scorer, classnames_of, told


def score_run(
    path: Path, split: str, configs: Sequence[Path] = (), plugins: Sequence[str] = (), overrides: Sequence[str] = ()
) -> tuple[dict[str, float], Metric]:
    """Returns the score per task of coefficients on a labelled split, and the metric that they are in.

    The scores of a run's own coefficients on its own data are also written into its summary.

    Args:
        path: folder of a run, or a coefficient file; such a file goes by the run that it lies in.
        split: ``test`` or ``validation``.
        configs: a pool's, where the data are another's or the file lies in no run.
        plugins: prefixes of modules that a file's recipe may name, besides those of the run's configuration.
        overrides: ``--key=value``, laid over the configuration.

    Raises:
        ConfigError: ``path`` is not a run's folder, and there is no pool.
    """
    run = path.parent if path.is_file() else path
    ours = (run / "config.yaml").is_file()
    if not ours and path.is_file() and not configs:
        raise ConfigError(
            f"{path} lies in no run's folder, so that its data are not known",
            expected="a file beside a config.yaml, or the pool to test it on",
            got=f"no config.yaml in {run}",
            todo=f"adamerge test {path} --config POOL.yaml",
        )
    if not ours and not path.is_file():
        raise ConfigError(f"{run} is not a run's folder: it has no config.yaml")
    if configs:
        words = Words([*map(str, configs)], ["--model.parametrization=adamerge.TaskWise", *overrides])
    else:
        words = Words([str(run / "config.yaml")], [*overrides])
    configured = Configured(read_first(words, "test"))
    backbone, data = configured.model.merged.backbone, configured.datamodule
    # whose data are another's is no reason to trust what lies beside a file
    trusted = sorted({*plugins, *(_modules(_configuration(run)) if ours and not configs else ())})
    coefficients = load_coefficients(path, plugins=trusted)
    check_scored(backbone, data, split)
    copy = copy_for_scores([configured.model.merged.copy])
    # heads are of the pool's experts: a file may merge what a solver made of them
    scorer = Scorer(backbone, data, configured.model.merged.task_vectors, split, copy)
    scores = means(scorer.of(coefficients))
    doubts = told([*exchanged_lines(scorer.confusions, classnames_of(data), "the merged model")])
    if configs or overrides or (path.is_file() and path.name != COEFFICIENTS):
        calibrated_on(data, split)
        return scores, data.metric
    summary = read_json(run / "summary.json")
    scored: dict[str, Any] = {"per_task": scores, "average": average(scores)}
    if coefficients.protocol:
        scored["calibrated_on"] = calibrated_on(data, split)
    told(data.skipped_lines(split))
    scored |= {"skipped_rows": data.skipped(split), "warnings": doubts}
    write_json(run / "summary.json", {**summary, split: scored})
    return scores, data.metric


def check_scored(backbone: Backbone, data: Calibration, split: str) -> None:
    """Checks that every task has a labelled split of this name.

    Raises:
        ConfigError: there are no data.
        DataError: a task's split is missing or empty, or has no labels.
    """
    if not data.tasks:
        raise ConfigError(
            "there are no data to score on", expected="tasks", got="data: null", todo="give the pool a data section"
        )
    data.serve(backbone)
    scored = data.labelled_tasks(split)
    for task in data.tasks:
        if task in scored:
            data.labelling.check(data.rows(task, split), data.label_place(task, split))  # decodes no sample
        else:
            data.labels(task, split)


def calibrated_on(data: Calibration, split: str) -> dict[str, int]:
    """Returns, and warns of, the number of scored samples by task that are calibration data too.

    In the papers' transductive setting all of them are by design: nothing is counted then.
    """
    overlaps = {} if data.transductive else overlap(data, split)
    for task, count in overlaps.items():
        warnings.warn(
            f"task '{task}': {count} of {len(data.rows(task, split))} samples of the {split} split are calibration data too",
            stacklevel=2,
        )
    return overlaps


def print_scores(scores: Mapping[str, float], metric: Metric) -> None:
    """Prints a table of scores with one row per task, and their average."""
    table = Table("task", f"{metric.name}, {metric.unit}")
    for task, value in scores.items():
        table.add_row(task, shown(value, metric.factor))
    table.add_section()
    table.add_row("average", shown(average(scores), metric.factor))
    Console().print(table)


def run_coefficients(run: Path) -> Coefficients:
    """Returns a run's coefficients; its own configuration, which is the user's code, says which modules they may name."""
    return load_coefficients(run / "coefficients.safetensors", plugins=sorted(_modules(_configuration(run))))


def run_copy(run: Path) -> Copy:
    """Returns how the merged copy of a run existed: whole, by blocks, or in parts over processes."""
    configuration = _configuration(run)
    spec = configuration["model"].get("copy")
    return WholeCopy() if spec is None else build({"init_args": {}, **spec}, Copy, sorted(_modules(configuration)))


def copy_for_scores(copies: Sequence[Copy]) -> Copy:
    """Returns how one process holds the models that it scores: whole only if all of them were whole in their fits.

    A model that was in parts over processes is scored block by block.
    """
    return next((copy for copy in copies if not copy.whole), WholeCopy()).alone()


def _configuration(run: Path) -> Any:
    return read_config(run / "config.yaml")


def _modules(configuration: Any) -> set[str]:
    if isinstance(configuration, dict):
        own = configuration.get("class_path")
        modules = {own.rpartition(".")[0]} if isinstance(own, str) and "." in own else set()
        return modules.union(*map(_modules, configuration.values()))
    return set().union(*map(_modules, configuration)) if isinstance(configuration, list) else set()


def shown(value: float, factor: float) -> str:
    """Formats a score for tables: percentages with one digit, nats with three."""
    return f"{factor * value:.1f}" if factor > 1 else f"{factor * value:.3f}"
