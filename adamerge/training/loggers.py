"""Loggers of one fit, opened and closed with it: metrics.csv whatever happens, wandb, and the user's own."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from adamerge.training.redaction import redacted
from adamerge.training.tracker import Tracker
from adamerge.training.wandb_run import start_wandb


@contextmanager
def tracked(folder: Path, chosen: Logger | Iterable[Logger] | bool | None, step: int = 0) -> Iterator[list[Logger]]:
    """Yields the loggers of one fit, and closes those that must be closed when it ends, however it ends.

    Args:
        folder: of the run, with its ``config.yaml``.
        chosen: ``trainer.logger``. A logger, or several, of whatever kind writes where its own arguments say, beside our
            ``metrics.csv`` and wandb; a ``WandbLogger`` takes the place of our wandb. False leaves wandb out, ``metrics.csv``
            alone is written; True is what None is.
        step: up to which rows of an interrupted run are kept.

    Yields:
        ``metrics.csv`` first.
    """
    settings = redacted(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    metrics = start_metrics(folder, step)
    own = [] if chosen is None or isinstance(chosen, bool) else [chosen] if isinstance(chosen, Logger) else list(chosen)
    trackers = [Tracker(other) for other in own if not isinstance(other, WandbLogger)]
    for tracker in trackers:
        tracker.log_hyperparams(settings)
    wandb_loggers: list[WandbLogger | None] = [logger for logger in own if isinstance(logger, WandbLogger)]
    for logger in wandb_loggers or ([] if chosen is False else [None]):
        wandb = start_wandb(folder, settings, logger)
        trackers += [] if wandb is None else [wandb]
    failed = True
    try:
        yield [metrics, *trackers]
        failed = False
    finally:
        for tracker in trackers:
            tracker.close(failed)


def start_metrics(folder: Path, step: int) -> CSVLogger:
    """Opens ``metrics.csv`` with the rows of an interrupted run up to ``step``; later steps are run again."""
    path = folder / "metrics.csv"
    rows = []
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    logger = CSVLogger(folder, name="", version="")
    kept = [row for row in rows if row.get("step", "").isdecimal() and int(row["step"]) < step]
    if kept:
        logger.experiment.metrics.extend(kept)
        logger.save()
    return logger
