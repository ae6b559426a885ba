"""A tracker: a logger whose failures are reported once and never end a fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from adamerge.artifacts.coefficients import Coefficients
from adamerge.training.redaction import redacted


class Tracker(Logger):
    """Passes on to a logger what it is told, until the logger fails; whatever else is asked is the logger's own answer.

    Args:
        inner: the logger.
    """

    def __init__(self, inner: Logger) -> None:
        super().__init__()
        self.inner = inner
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        """What only some loggers have, such as ``experiment``."""
        if name == "inner":  # not there yet, while it is copied
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def name(self) -> str | None:
        """The logger's."""
        return self.inner.name

    @property
    def version(self) -> int | str | None:
        """The logger's."""
        return self.inner.version

    @property
    def save_dir(self) -> str | None:
        """The logger's."""
        return self.inner.save_dir

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log figures of a step."""
        self.attempt(lambda: self.inner.log_metrics(dict(metrics), step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Log the configuration."""
        self.attempt(lambda: self.inner.log_hyperparams(params, *args, **kwargs))

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        """Log the network."""
        self.attempt(lambda: self.inner.log_graph(*args, **kwargs))

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Take note of a checkpoint."""
        self.attempt(lambda: self.inner.after_save_checkpoint(checkpoint_callback))

    def save(self) -> None:
        """Write what waits."""
        self.attempt(lambda: self.inner.save())

    def finalize(self, status: str) -> None:
        """Write the rest."""
        self.attempt(lambda: self.inner.finalize(status))

    def give(self, coefficients: Coefficients, path: Path, heatmap: Path) -> None:
        """Take what a fit makes, where the logger has a place for it."""

    def close(self, failed: bool) -> None:
        """End with the fit; loggers that Lightning closes have nothing left to do."""

    def attempt(self, action: Callable[[], Any]) -> None:
        """Do it, or give up for good."""
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Say so, once."""
        if not self._failed:
            what = type(self.inner).__name__.removesuffix("Logger").lower()
            print(f"{what} stopped working and is left out from here on ({redacted(str(error))}); metrics.csv goes on")
        self._failed = True


def hand_over(loggers: Iterable[Logger], coefficients: Coefficients, path: Path, heatmap: Path) -> None:
    """Give what a fit made to those of its loggers that have a place for it."""
    for logger in loggers:
        if isinstance(logger, Tracker):
            logger.give(coefficients, path, heatmap)
