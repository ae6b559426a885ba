"""Scoring: a run's merged model, the base and the experts on labelled data, one process and one network for all."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from adamerge.artifacts.coefficients import Coefficients, load_coefficients
from adamerge.artifacts.recipe import build
from adamerge.backbones import Backbone
from adamerge.data import Calibration
from adamerge.data.metrics import Accuracy, Metric
from adamerge.data.overlap import overlap
from adamerge.errors import ConfigError
from adamerge.io.atomic import write_json
from adamerge.io.coefficient_file import COEFFICIENTS
from adamerge.io.untrusted_files import read_json
from adamerge.merging.copies import Copy, WholeCopy
from adamerge.merging.merged_model import MergedModel
from adamerge.parametrizations import ParametrizationFactory, TaskWise
from adamerge.runs.command_line import Words
from adamerge.runs.config_files import read_config
from adamerge.runs.instantiate import Configured
from adamerge.runs.parser import read_first
from adamerge.task_vectors.storage import Disk
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.confusions import Confusions, exchanged_lines, far_below_lines
from adamerge.training.evaluation import average, means, score

Scores = dict[str, Tensor]
"""Task to the score of each sample."""


class Scorer:
    """Scores merged models on one split, with one backbone and samples decoded once.

    Args:
        backbone: refilled for every model.
        data: labelled splits.
        vectors: base and experts.
        split: ``test`` or ``validation``.
        copy: whether each model exists at once or block by block, with the same scores; at once when None.

    Attributes:
        confusions: of the model that was scored last: task to samples by label and predicted class, where there are classes.
    """

    def __init__(
        self, backbone: Backbone, data: Calibration, vectors: TaskVectors, split: str, copy: Copy | None = None
    ) -> None:
        self.backbone, self.data, self.vectors, self.split, self.copy = backbone, data, vectors, split, copy
        self.confusions: dict[str, Tensor] = {}
        data.serve(backbone)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._plain()
        backbone.build_heads(data.tasks, vectors.checkpoints)

    def base(self) -> Scores:
        """The base alone."""
        return self._score(self._plain())

    def experts(self) -> Scores:
        """Each expert on its own task; a task without an expert of its name is left to the base."""
        hits: Scores = {}
        model = self._plain()
        for task in self.data.tasks:
            if task in self.vectors.experts:
                model.fill_expert(task)
            else:
                model.fill(self.vectors.base.__getitem__)
            hits |= self._score(model, [task])
        return hits

    def merged(self, vectors: TaskVectors, parametrization: ParametrizationFactory) -> Scores:
        """A merged model on all tasks."""
        return self.of(Coefficients(vectors, parametrization(vectors)))

    def of(self, coefficients: Coefficients) -> Scores:
        """The merged model that a coefficient file describes, on all tasks."""
        model = self._model(coefficients)
        with torch.no_grad():
            model.merge()
        return self._score(model)

    def _plain(self) -> MergedModel:
        """Filled with the base."""
        return self._model(Coefficients(self.vectors, TaskWise(self.vectors, init=0.0)))

    def _model(self, coefficients: Coefficients) -> MergedModel:
        """The backbone, which is this model's from now on and no earlier one's: its blocks obey one alone."""
        parametrization = coefficients.parametrization.to(self.device)
        return MergedModel(
            self.backbone,
            coefficients.task_vectors,
            parametrization,
            Disk(),
            buffers=coefficients.buffers,
            copy=self.copy,
        )

    def _score(self, model: MergedModel, tasks: Sequence[str] | None = None) -> Scores:
        names = list(self.data.tasks) if tasks is None else tasks
        scores = {}
        for task in names:
            metric = Confusions() if type(self.data.metric) is Accuracy else self.data.metric
            scores[task] = score(model, task, self.data.eval_dataloader(task, self.split), metric)
            if isinstance(metric, Confusions) and metric.counts is not None:
                self.confusions[task] = metric.counts
        return scores

    def doubts(self, base: Scores, experts: Scores) -> list[str]:
        """Signs that labels and rows of a head mean other classes, each told; asked for when the experts were scored last.

        Args:
            base: scores of the base.
            experts: of each expert on its own task.
        """
        own = [task for task in self.data.tasks if task in self.vectors.experts]
        counts = {task: self.confusions[task] for task in own if task in self.confusions}
        return told(
            [
                *far_below_lines(base, {task: experts[task] for task in own}, self.data.metric),
                *exchanged_lines(counts, _classnames(self.data), "its own expert"),
            ]
        )


def score_run(
    path: Path, split: str, configs: Sequence[Path] = (), plugins: Sequence[str] = (), overrides: Sequence[str] = ()
) -> tuple[dict[str, float], Metric]:
    """Score per task of coefficients on a labelled split, and the metric.

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
    scorer = Scorer(backbone, data, coefficients.task_vectors, split, copy)
    scores = means(scorer.of(coefficients))
    doubts = told([*exchanged_lines(scorer.confusions, _classnames(data), "the merged model")])
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
    """See whether every task has a labelled split of this name.

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
    """Task to the number of scored samples that are calibration data too, which is told; in the papers' setting all are."""
    found = {} if data.transductive else overlap(data, split)
    for task, count in found.items():
        warnings.warn(
            f"task '{task}': {count} of {len(data.rows(task, split))} samples of the {split} split are calibration data too",
            stacklevel=2,
        )
    return found


def told(lines: Sequence[str]) -> list[str]:
    """Warns of each line, and returns them."""
    for line in lines:
        warnings.warn(line, stacklevel=2)
    return list(lines)


def _classnames(data: Calibration) -> dict[str, Sequence[str]]:
    return {task: words.classnames for task, words in data.tasks.items()}


def print_scores(scores: Mapping[str, float], metric: Metric) -> None:
    """One row per task."""
    table = Table("task", f"{metric.name}, {metric.unit}")
    for task, value in scores.items():
        table.add_row(task, shown(value, metric.factor))
    table.add_section()
    table.add_row("average", shown(average(scores), metric.factor))
    Console().print(table)


def run_coefficients(run: Path) -> Coefficients:
    """A run's coefficients; its own configuration, which is the user's code, says which modules they may name."""
    return load_coefficients(run / "coefficients.safetensors", plugins=sorted(_modules(_configuration(run))))


def run_copy(run: Path) -> Copy:
    """How the merged copy of a run existed."""
    configuration = _configuration(run)
    spec = configuration["model"].get("copy")
    return WholeCopy() if spec is None else build({"init_args": {}, **spec}, Copy, sorted(_modules(configuration)))


def copy_for_scores(copies: Sequence[Copy]) -> Copy:
    """How models exist that one process scores, of how they existed in fits: at once only if all did.

    One that was in parts over processes is block by block here.
    """
    return next((copy for copy in copies if not copy.whole), WholeCopy()).alone()


def _configuration(run: Path) -> Any:
    return read_config(run / "config.yaml")


def _modules(configuration: Any) -> set[str]:
    if isinstance(configuration, dict):
        own = configuration.get("class_path")
        found = {own.rpartition(".")[0]} if isinstance(own, str) and "." in own else set()
        return found.union(*map(_modules, configuration.values()))
    return set().union(*map(_modules, configuration)) if isinstance(configuration, list) else set()


def shown(value: float, factor: float) -> str:
    """As tables have it: percentages with one digit, nats with three."""
    return f"{factor * value:.1f}" if factor > 1 else f"{factor * value:.3f}"
