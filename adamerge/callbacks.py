"""Callbacks: the coefficient file, the heat map, the summary, and checkpoints that are written whole or not at all."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from adamerge.coefficients import Coefficients, save_coefficients
from adamerge.errors import AdamergeError, CheckpointError, CollapsedError, DivergedError
from adamerge.modules import MergingModule
from adamerge.staging import staged_file

Table = Mapping[str, Mapping[str, list[float]]]


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically; NaN becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with staged_file(path) as temporary:
        temporary.write_text(json.dumps(plain(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def draw_heatmap(table: Table, path: Path, title: str = "Merging coefficients") -> None:
    """A picture of the coefficients: experts across, groups down (the mean of a group's chunks), values written small.

    Args:
        table: group name to expert name to the group's coefficients.
        path: of the PNG.
        title: above it.

    """
    matplotlib.use("agg")
    from matplotlib import pyplot

    groups = sorted(table, key=_natural)
    experts = list(table[groups[0]])
    values = [[sum(table[group][task]) / len(table[group][task]) for task in experts] for group in groups]
    size = (2.5 + 0.75 * len(experts) + 0.06 * max(map(len, groups)), 1.4 + 0.19 * max(len(groups), 4))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    low, high = min(0.0, *map(min, values)), max(1e-6, *map(max, values))
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=low, vmax=high)
    axes.set_xticks(range(len(experts)), experts, rotation=40, ha="right")
    axes.set_yticks(range(len(groups)), groups, fontsize=7)
    if len(groups) * len(experts) <= 1000:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                colour = "black" if value > (low + high) / 2 else "white"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=5, color=colour)
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, shrink=0.6)
    with staged_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts block 10 after block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints written beside their target, synced and renamed; a corrupt one is a typed error that names the file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the file."""
        with staged_file(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the file; nothing in it is executed."""
        try:
            loaded: dict[str, Any] = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path} is corrupt or not a checkpoint of a run: {error}") from error
        return loaded


class CoefficientFile(Callback):
    """Writes ``coefficients.safetensors`` when the fit ends, however it ends, and gives it to wandb as an artifact.

    Args:
        folder: of the run.

    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "coefficients.safetensors"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, draw and log."""
        if trainer.is_global_zero and isinstance(pl_module, MergingModule):
            coefficients = pl_module.coefficients()
            save_coefficients(coefficients, self.path)
            heatmap = self.path.with_name("heatmap.png")
            draw_heatmap(coefficients.table(), heatmap, f"Merging coefficients after {coefficients.step} steps")
            for logger in trainer.loggers:
                if isinstance(logger, PatientWandb):
                    logger.give(coefficients, self.path, heatmap)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the last good coefficients."""
        if trainer.is_global_zero and isinstance(pl_module, MergingModule) and trainer.global_step > 0:
            save_coefficients(pl_module.coefficients(), self.path)


class CollapseGuard(Callback):
    """Stops a fit whose predictions for a task collapsed onto one class: entropy is then low and the model useless.

    Every ``every`` steps it looks at the mean over them of each task's most frequent class's share of the batch and of the
    batch's marginal entropy. A task that was one-sided from the start, as with one-class calibration data, is left alone.

    Args:
        every: steps between two looks; the device is waited for only then.
        share: of the batch that one class must take.
        spread: normalised marginal entropy that must be left.
    """

    def __init__(self, every: int = 25, share: float = 0.95, spread: float = 0.1) -> None:
        self.every, self.share, self.spread = every, share, spread
        self._sums: dict[str, torch.Tensor] = {}
        self._healthy: set[str] = set()
        self._steps = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add up; look now and then."""
        for name, value in trainer.callback_metrics.items():
            if name.startswith(("train/top_class_share/", "train/marginal_entropy/")):
                self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        self._steps += 1
        if self._steps % self.every == 0:
            means = {name: float(total) / self.every for name, total in self._sums.items()}
            self._sums = {}
            for task in batch:
                share, spread = means[f"train/top_class_share/{task}"], means[f"train/marginal_entropy/{task}"]
                if share < self.share or spread > self.spread:
                    self._healthy.add(task)
                elif task in self._healthy:
                    raise CollapsedError(
                        f"step {trainer.global_step}: predictions for task '{task}' collapsed onto one class",
                        expected=f"a largest class below {self.share:.0%} of a batch",
                        got=f"{share:.0%}, marginal entropy {spread:.3f} of log(classes)",
                        todo="use fewer steps, a lower model.lr, model.penalty, or normalise the entropy",
                    )


class PatientWandb(WandbLogger):
    """A wandb logger whose failures are reported once and never end a run."""

    _failed = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log, or give up for good."""
        self._try(lambda: WandbLogger.log_metrics(self, metrics, step))

    def give(self, coefficients: Coefficients, path: Path, heatmap: Path) -> None:
        """Log the coefficients as an artifact and the heat map as a picture and a table."""
        import wandb

        def log() -> None:
            vectors = coefficients.task_vectors
            fingerprints = {task: checkpoint.fingerprint for task, checkpoint in vectors.checkpoints.items()}
            metadata = {"step": coefficients.step, "base": vectors.base.fingerprint, "experts": fingerprints}
            artifact = wandb.Artifact(f"coefficients-{self.experiment.id}", "merge-coefficients", metadata=metadata)
            artifact.add_file(str(path))
            self.experiment.log_artifact(artifact)
            rows = [
                [group, task, index, value]
                for group, experts in coefficients.table().items()
                for task, values in experts.items()
                for index, value in enumerate(values)
            ]
            table = wandb.Table(columns=["group", "expert", "chunk", "coefficient"], data=rows)
            self.experiment.log({"coefficients/heatmap": wandb.Image(str(heatmap)), "coefficients/table": table})

        self._try(log)

    def finalize(self, status: str) -> None:
        """Close what can be closed."""
        self._try(lambda: WandbLogger.finalize(self, status))

    def _try(self, action: Any) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            self._failed = True
            print(f"wandb stopped working and is left out from here on ({error}); metrics.csv goes on")


class Summary(Callback):
    """Keeps ``summary.json``: status, figures per task, timings, peak memory and the data protocol.

    Args:
        folder: of the run.

    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "summary.json"
        self._start = time.monotonic()
        self._content: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that the run has begun."""
        if trainer.is_global_zero and isinstance(pl_module, MergingModule):
            self._content = {"protocol": pl_module.coefficients().protocol}
            self._write(trainer, "running")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that it is done."""
        if trainer.is_global_zero:
            self._write(trainer, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how it ended."""
        statuses: dict[type, str] = {DivergedError: "diverged", CollapsedError: "collapsed"}
        status = statuses.get(type(exception), "failed")
        if trainer.is_global_zero:
            what = exception.what if isinstance(exception, AdamergeError) else repr(exception)
            self._content["error"] = what
            self._write(trainer, status)

    def _write(self, trainer: Trainer, status: str) -> None:
        seconds = time.monotonic() - self._start
        metrics = {name: float(value) for name, value in trainer.logged_metrics.items()}
        content = {"status": status, "step": trainer.global_step, "seconds": round(seconds, 3), "metrics": metrics}
        if torch.cuda.is_available():
            content["peak_device_bytes"] = torch.cuda.max_memory_allocated()
        write_json(self.path, {**content, **self._content})
