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
    """Passes on to a logger what it is told, until the logger fails; what else is asked of it, the logger answers.

    Args:
        inner: the logger.
    """

    def __init__(self, inner: Logger) -> None:
        super().__init__()
        self.inner = inner
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute that only some loggers have, such as ``experiment``, from the logger."""
        if name == "inner":  # not there yet, while it is copied
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def name(self) -> str | None:
        """Returns the name that the logger has."""
        return self.inner.name

    @property
    def version(self) -> int | str | None:
        """Returns the version that the logger has."""
        return self.inner.version

    @property
    def save_dir(self) -> str | None:
        """Returns the folder that the logger writes to."""
        return self.inner.save_dir

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs the figures of a step, until the logger fails."""
        self.attempt(lambda: self.inner.log_metrics(dict(metrics), step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Logs the configuration, until the logger fails."""
        self.attempt(lambda: self.inner.log_hyperparams(params, *args, **kwargs))

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        """Logs the graph of the network, until the logger fails."""
        self.attempt(lambda: self.inner.log_graph(*args, **kwargs))

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Tells the logger of a saved checkpoint, until the logger fails."""
        self.attempt(lambda: self.inner.after_save_checkpoint(checkpoint_callback))

    def save(self) -> None:
        """Lets the logger write the figures that wait, until the logger fails."""
        self.attempt(lambda: self.inner.save())

    def finalize(self, status: str) -> None:
        """Lets the logger write what is left when a fit ends, until the logger fails."""
        self.attempt(lambda: self.inner.finalize(status))

    def give(self, coefficients: Coefficients, path: Path, heatmap: Path) -> None:
        """Takes the coefficients, their file and their heat map where the logger has a place for them."""

    def close(self, failed: bool) -> None:
        """Closes the logger with the fit; loggers that Lightning closes have nothing left to do."""

    def attempt(self, action: Callable[[], Any]) -> None:
        """Runs an action of the logger, and gives the logger up when it fails."""
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        """Stops using the logger, and reports its error once."""
        if not self._failed:
            what = type(self.inner).__name__.removesuffix("Logger").lower()
            print(f"{what} stopped working and is left out from here on ({redacted(str(error))}); metrics.csv goes on")
        self._failed = True


def hand_over(loggers: Iterable[Logger], coefficients: Coefficients, path: Path, heatmap: Path) -> None:
    """Gives the coefficients, their file and their heat map to those of a fit's loggers that have a place for them."""
    for logger in loggers:
        if isinstance(logger, Tracker):
            logger.give(coefficients, path, heatmap)
