"""Tracking: wandb as the environment says, metrics.csv whatever happens, and no secret in either."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, WandbLogger

from adamerge.coefficients import Coefficients

PATIENCE = 20  # seconds for the server's first answer
SECRET_WORDS = {
    "key",
    "apikey",
    "token",
    "tokens",
    "secret",
    "secrets",
    "password",
    "passwd",
    "credential",
    "credentials",
}
SECRET_VALUES = re.compile(r"\bhf_[A-Za-z0-9]{10,}|\b[0-9a-f]{40}\b|(?<![A-Za-z0-9])sk-[\w-]{8,}|(?<=://)[^/\s]+@")


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


def start_wandb(folder: Path, settings: Mapping[str, Any]) -> PatientWandb | None:
    """A logger as ``WANDB_MODE`` says: online, offline or disabled; offline where there is no key or no server.

    Args:
        folder: of the run, which also gives it its name and id.
        settings: logged as the run's configuration, without what looks like a secret.
    """
    mode = os.environ.get("WANDB_MODE", "online")
    if mode == "disabled":
        return None
    import wandb

    def start(how: Any) -> PatientWandb:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "adamerge"),
            name=f"{folder.parent.name}/{folder.name}",
            id=folder.name,
            resume="allow" if how == "online" else None,
            dir=folder,
            mode=how,
            config=redacted(settings),
            settings=wandb.Settings(init_timeout=PATIENCE, silent=True),
        )
        return PatientWandb(experiment=run)

    try:
        has_key = bool(os.environ.get("WANDB_API_KEY")) or (mode == "online" and wandb.login(prompt=False))
        return start("online" if mode == "online" and has_key else "offline")
    except Exception as error:
        print(f"wandb: {str(error).splitlines()[0] if str(error) else type(error).__name__}; logging offline instead")
    try:
        with environment_variable("WANDB_MODE", "offline"):
            return start("offline")
    except Exception as error:
        print(f"wandb is left out: {error}; metrics.csv has everything")
        return None


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Set a variable for a while, for this process and those it starts meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def redacted(settings: Any) -> Any:
    """The same settings with ``…`` for every value that looks like a secret, by its key or by its shape."""
    if isinstance(settings, Mapping):
        return {key: "…" if value and _is_secret(str(key)) else redacted(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [redacted(value) for value in settings]
    return SECRET_VALUES.sub("…", settings) if isinstance(settings, str) else settings


def _is_secret(key: str) -> bool:
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", key)
    return bool(words) and words[-1].lower() in SECRET_WORDS


def start_metrics(folder: Path, step: int) -> CSVLogger:
    """``metrics.csv``, with the rows of an interrupted run up to ``step``; later steps are run again."""
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
