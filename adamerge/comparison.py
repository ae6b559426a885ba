"""Comparison: several methods on one pool, beside the base, the experts and tuned task arithmetic, in one table."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from adamerge.backbones import Backbone
from adamerge.coefficients import Coefficients, load_coefficients
from adamerge.config_files import config_files
from adamerge.configuration import ConfigCLI
from adamerge.data import Calibration
from adamerge.errors import CollapsedError, ConfigError, DivergedError
from adamerge.evaluation import Metric, average, gap_closed, means, paired_step, score
from adamerge.files import read_json
from adamerge.merged_model import MergedModel
from adamerge.parametrizations import ParametrizationFactory, TaskWise
from adamerge.stages import fit, for_stage, stage_files, started
from adamerge.staging import write_json
from adamerge.storage import Disk
from adamerge.task_vectors import TaskVectors

Scores = dict[str, Tensor]
REFERENCES = ("pretrained", "individual", "task_arithmetic_0.3", "task_arithmetic_tuned")
"""What every comparison holds besides the methods asked for."""
LAMBDAS = [round(0.05 * step, 2) for step in range(21)]


def compare(pool: Path, methods: Sequence[Path], folder: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Fit every method (finished fits in ``folder`` are not repeated), score all on the test split.

    ``task_arithmetic_tuned`` is an oracle: its coefficient is the best of 0, 0.05 ... 1 on the TEST labels.
    ``gap_closed`` is (method - tuned) / (individual - tuned), of the averages.

    Returns:
        What is written to ``folder/comparison.json``: tasks, methods with per_task, average, gap_closed and labels,
        and each method's distance to the oracle and to the experts with its paired standard error.

    Raises:
        AdamergeError: as ``fit``.
    """
    for config in (pool, *methods):
        if not config.exists() or (config is pool and config.is_dir()):
            raise ConfigError(f"no such configuration: {config}")
    stems = [method.stem for method in methods]
    if len(set(stems)) < len(stems):
        raise ConfigError(f"two methods have the same name: {sorted(stems)}", todo="rename one of them")
    runs = {}
    for method in methods:
        try:
            runs[method.stem] = fitted(pool, method, folder, overrides)
        except (CollapsedError, DivergedError) as error:
            print(f"{method.stem} is left out: {error.what}")
    cli = ConfigCLI(_one_stage(pool, methods[0], overrides))
    vectors = TaskVectors(
        cli.model.merged.task_vectors.base,
        cli.model.merged.task_vectors.checkpoints,
        include=cli.model.merged.task_vectors.include,
        exclude=cli.model.merged.task_vectors.exclude,
    )
    scorer = Scorer(cli.model.merged.backbone, cli.datamodule, vectors, "test")
    hits: dict[str, Scores] = {"pretrained": scorer.base(), "individual": scorer.experts()}
    by_lambda = {value: scorer.merged(vectors, partial(TaskWise, init=value)) for value in LAMBDAS}
    best = cli.datamodule.metric.best({value: average(means(scores)) for value, scores in by_lambda.items()})
    hits["task_arithmetic_0.3"], hits["task_arithmetic_tuned"] = by_lambda[0.3], by_lambda[best]
    protocols: dict[str, Mapping[str, Any]] = {}
    for name, run in runs.items():
        coefficients = run_coefficients(run)
        protocols[name] = coefficients.protocol
        hits[name] = scorer.of(coefficients)
    result = _result(hits, list(cli.datamodule.tasks), protocols, cli.datamodule.metric)
    result["tuned_lambda"] = best
    result["runs"] = {name: str(run) for name, run in runs.items()}
    write_json(folder / "comparison.json", result)
    return result


class Scorer:
    """Scores merged models on one split, with one backbone and samples decoded once.

    Args:
        backbone: refilled for every model.
        data: labelled splits.
        vectors: base and experts.
        split: ``test`` or ``validation``.
    """

    def __init__(self, backbone: Backbone, data: Calibration, vectors: TaskVectors, split: str) -> None:
        self.backbone, self.data, self.vectors, self.split = backbone, data, vectors, split
        data.serve(backbone)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._plain = MergedModel(backbone, vectors, TaskWise(vectors, init=0.0), storage=Disk()).to(self.device)
        self._plain.fill(vectors.base.__getitem__)
        backbone.build_heads(data.tasks, vectors.checkpoints)

    def base(self) -> Scores:
        """The base alone."""
        self._plain.fill(self.vectors.base.__getitem__)
        return self._score(self._plain)

    def experts(self) -> Scores:
        """Each expert on its own task; a task without an expert of its name is left to the base."""
        hits: Scores = {}
        for task in self.data.tasks:
            if task in self.vectors.experts:
                self._plain.fill_expert(task)
            else:
                self._plain.fill(self.vectors.base.__getitem__)
            hits |= self._score(self._plain, [task])
        return hits

    def merged(self, vectors: TaskVectors, parametrization: ParametrizationFactory) -> Scores:
        """A merged model on all tasks."""
        return self.of(Coefficients(vectors, parametrization(vectors)))

    def of(self, coefficients: Coefficients) -> Scores:
        """The merged model that a coefficient file describes, on all tasks."""
        vectors, parametrization = coefficients.task_vectors, coefficients.parametrization
        model = MergedModel(self.backbone, vectors, parametrization, storage=Disk(), buffers=coefficients.buffers)
        model.to(self.device)
        with torch.no_grad():
            model.merge()
        return self._score(model)

    def _score(self, model: MergedModel, tasks: Sequence[str] | None = None) -> Scores:
        names = list(self.data.tasks) if tasks is None else tasks
        loader, metric = self.data.eval_dataloader, self.data.metric
        return {task: score(model, task, loader(task, self.split), metric) for task in names}


def score_run(run: Path, split: str) -> tuple[dict[str, float], Metric]:
    """Score per task of a run's coefficients on a labelled split, also written into the run's summary; and the metric.

    Raises:
        ConfigError: ``run`` is not a run's folder.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run} is not a run's folder: it has no config.yaml")
    cli = ConfigCLI(["--config", str(run / "config.yaml")])
    coefficients = run_coefficients(run)
    scorer = Scorer(cli.model.merged.backbone, cli.datamodule, coefficients.task_vectors, split)
    scores = means(scorer.of(coefficients))
    summary = read_json(run / "summary.json")
    write_json(run / "summary.json", {**summary, split: {"per_task": scores, "average": average(scores)}})
    return scores, cli.datamodule.metric


def print_scores(scores: Mapping[str, float], metric: Metric) -> None:
    """One row per task."""
    table = Table("task", f"{metric.name}, {metric.unit}")
    for task, value in scores.items():
        table.add_row(task, _shown(value, metric.factor))
    table.add_section()
    table.add_row("average", _shown(average(scores), metric.factor))
    Console().print(table)


def print_table(result: Mapping[str, Any]) -> None:
    """One row per method, worst average first, the experts themselves last."""
    headings = ["method", *result["tasks"], "average", "gap closed", "to oracle", "labels"]
    metric = result["metric"]
    factor, sign = metric["factor"], 1 if metric["higher_is_better"] else -1
    title = f"{metric['name']} on the test split, {metric['unit']}"
    table = Table(*(Column(heading, no_wrap=True) for heading in headings), title=title)
    rows = sorted(result["methods"].items(), key=lambda item: (item[0] == "individual", sign * item[1]["average"]))
    for name, row in rows:
        difference, error = row["to_oracle"]
        tuned = name == "task_arithmetic_tuned"
        table.add_row(
            f"{name} ({result['tuned_lambda']})" if tuned else name,
            *(_shown(row["per_task"][task], factor) for task in result["tasks"]),
            _shown(row["average"], factor),
            f"{100 * row['gap_closed'] + 0.0:.0f} %",
            f"{'+' if difference >= 0 else ''}{_shown(difference, factor)} ± {_shown(error, factor)}",
            "test labels" if tuned else "used" if row["labels"] else "no",
        )
    console = Console(width=max(Console().width, 90 + 12 * len(result["tasks"])))
    console.print(table)
    console.print(
        "gap closed: share of the way from tuned task arithmetic to the individual experts. "
        f"to oracle: {metric['unit']} over tuned task arithmetic, ± one paired standard error."
    )


def _shown(value: float, factor: float) -> str:
    return f"{factor * value:.1f}" if factor > 1 else f"{factor * value:.3f}"


def fitted(pool: Path, method: Path, folder: Path, overrides: Sequence[str]) -> Path:
    """The method's run in the comparison's folder: found finished, resumed, or fitted now."""
    arguments = ["--config", str(pool), "--config", str(method), *overrides]
    stages = stage_files(arguments)
    if not stages:
        arguments = _one_stage(pool, method, overrides)
    # a change of the configuration is another fit, never one found finished
    files = [pool, *(stages or [method]), *map(Path, config_files(overrides))]
    recipe = b"\0".join([*(path.read_bytes() for path in files), *(word.encode() for word in overrides)])
    run = folder / "fits" / f"{method.stem}-{hashlib.sha256(recipe).hexdigest()[:8]}"
    if (run / "summary.json").is_file() and read_json(run / "summary.json").get("status") == "finished":
        return run
    if started(run):
        fit([], resume=run)
        return run
    fit([*arguments, "--runs", str(folder), "--name", "fits", "--id", run.name])
    return run


def _one_stage(pool: Path, method: Path, overrides: Sequence[str]) -> list[str]:
    """The arguments of a method, of the first stage where it has several; overrides of single stages do not count."""
    arguments = ["--config", str(pool), "--config", str(method), *overrides]
    stages = stage_files(arguments)
    return for_stage(arguments, stages[0], 1) if stages else for_stage(arguments, None, 0)


def run_coefficients(run: Path) -> Coefficients:
    """A run's coefficients; its own configuration, which is the user's code, says which modules they may name."""
    configuration = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    return load_coefficients(run / "coefficients.safetensors", plugins=sorted(_modules(configuration)))


def _modules(configuration: Any) -> set[str]:
    if isinstance(configuration, dict):
        own = configuration.get("class_path")
        found = {own.rpartition(".")[0]} if isinstance(own, str) and "." in own else set()
        return found.union(*map(_modules, configuration.values()))
    return set().union(*map(_modules, configuration)) if isinstance(configuration, list) else set()


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
    """Whether labels drove the fit, or chose its result."""
    return bool(protocol.get("labelled") or protocol.get("selection"))
