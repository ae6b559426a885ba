"""One wandb run per fit: opened as the environment says, offline where no server answers, and closed with the fit."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger

from adamerge.artifacts.coefficient_table import Moments, Table
from adamerge.artifacts.coefficients import Coefficients
from adamerge.training.redaction import redacted, redacted_words
from adamerge.training.tracker import Tracker

PATIENCE = 20  # seconds for the server's first answer, and for the rest of a run to be taken when it ends
_group: ContextVar[str | None] = ContextVar("group", default=None)


class WandbTracker(Tracker):
    """A wandb logger that also takes a fit's coefficients and heat map, and whose run is closed with the fit."""

    inner: WandbLogger

    def give(self, coefficients: Coefficients, path: Path, heatmap: Path) -> None:
        """Logs the coefficients as an artifact and the heat map as a picture and a table."""
        import wandb

        def log() -> None:
            vectors, run = coefficients.task_vectors, self.inner.experiment
            fingerprints = {task: checkpoint.fingerprint for task, checkpoint in vectors.checkpoints.items()}
            metadata = {"step": coefficients.step, "base": vectors.base.fingerprint, "experts": fingerprints}
            artifact = wandb.Artifact(f"coefficients-{run.id}", "merge-coefficients", metadata=metadata)
            artifact.add_file(str(path))
            run.log_artifact(artifact)
            columns, rows = _rows(coefficients.table())
            table = wandb.Table(columns=columns, data=rows)
            run.log({"coefficients/heatmap": wandb.Image(str(heatmap)), "coefficients/table": table})

        self.attempt(log)

    def close(self, failed: bool) -> None:
        """Closes the run: what is not sent within ``PATIENCE`` stays in the run's folder, for ``wandb sync``."""
        try:
            run = self.inner.experiment
            run.finish(exit_code=int(failed))
        except TimeoutError:
            print(f"wandb: not all was taken in time; upload the rest with: wandb sync {Path(run.dir).parent}")
        except Exception as error:
            self.give_up(error)


def _rows(table: Table) -> tuple[list[str | int], list[list[Any]]]:
    """Returns what wandb's table has of the coefficients: each, or mean and spread of a group's where they are many."""
    cells = [(group, task, cell) for group, experts in table.items() for task, cell in experts.items()]
    if any(isinstance(cell, Moments) for _, _, cell in cells):
        return ["group", "expert", "mean", "spread"], [[group, task, *cell] for group, task, cell in cells]
    columns: list[str | int] = ["group", "expert", "chunk", "coefficient"]
    return columns, [[group, task, index, one] for group, task, cell in cells for index, one in enumerate(cell)]


@contextmanager
def grouped(folder: Path) -> Iterator[None]:
    """Lets wandb runs that begin meanwhile share a group of the folder's name, or the group that they are in already.

    Args:
        folder: of a run of several stages, or of a comparison.
    """
    name = f"{folder.absolute().parent.name}/{folder.absolute().name}-{_digest(folder)[:8]}"
    token = _group.set(_group.get() or name[-128:])
    try:
        yield
    finally:
        _group.reset(token)


def start_wandb(folder: Path, settings: Mapping[str, Any], own: WandbLogger | None = None) -> WandbTracker | None:
    """Starts the fit's wandb run as ``WANDB_MODE`` says: online, offline, disabled; offline without a key or a server.

    It is a run of its own, whatever other wandb runs this process has. What it is called and where it goes is said by, in
    this order, the user's ``WandbLogger``; the environment, ``WANDB_NAME``, ``WANDB_RUN_GROUP``, ``WANDB_PROJECT`` and all
    else that wandb reads there; and the run's folder. ``WANDB_RUN_ID`` alone is not heeded, since several fits of one process
    would share it; and of fits that form a group, each has its own name behind ``WANDB_NAME``.

    The id is made from the folder's whole path and the moment at which the run began, and is kept in the folder: a resumed
    run goes on under it from whatever working directory, and so does one that was moved. What had to be logged offline
    because no server answered is a run of its own, ``ID-offline``.

    Args:
        folder: of the run.
        settings: logged as the run's configuration; without secrets.
        own: the user's logger, which takes the place of ours.
    """
    mode = os.environ.get("WANDB_MODE", "online")
    if own is not None:
        mode = "offline" if own._offline else own._wandb_init.get("mode") or mode
    if mode == "disabled":
        return None
    try:
        options = _options(folder, own)
        (folder / "wandb").mkdir(exist_ok=True)
        (folder / "wandb" / "id").write_text(options["id"], encoding="utf-8")
    except Exception as error:
        _left_out(error)
        return None
    records = Path(options["dir"]) / "wandb"
    before = set(records.glob("run-*"))
    try:
        online = mode == "online" and _has_key()
        return _start({**options, "mode": "online" if online else "offline"}, settings, own)
    except Exception as error:
        print(f"wandb: {_first_line(error)}; logging offline instead")
    for begun in set(records.glob(f"run-*-{options['id']}")) - before:
        shutil.rmtree(begun, ignore_errors=True)
    try:
        with environment_variable("WANDB_MODE", "offline"):
            # wandb's service holds the first id for in use
            return _start({**options, "mode": "offline", "id": f"{options['id']}-offline"}, settings, own)
    except Exception as error:
        _left_out(error)
        return None


def _options(folder: Path, own: WandbLogger | None) -> dict[str, Any]:
    """Returns the arguments of ``wandb.init`` for a run in this folder."""
    group, name = os.environ.get("WANDB_RUN_GROUP") or _group.get(), os.environ.get("WANDB_NAME")
    if name and _group.get():
        name = f"{name}/{folder.name}"
    options: dict[str, Any] = {
        "project": os.environ.get("WANDB_PROJECT", "adamerge"),
        "name": name or f"{folder.absolute().parent.name}/{folder.absolute().name}",
        "group": group,
        "dir": ".",
        "id": _id(folder),
    }
    if own is not None:
        options |= {key: value for key, value in own._wandb_init.items() if value is not None}
    place = folder if options["dir"] == "." else Path(options["dir"])  # a logger has "." where nothing is said
    options["dir"] = str(place.absolute())  # wandb's service stays in the directory that it was started in
    return options


def _id(folder: Path) -> str:
    place = folder / "wandb" / "id"
    if place.is_file():
        return place.read_text(encoding="utf-8").strip()
    return sha256(f"{platform.node()} {_digest(folder)} {time.time_ns()}".encode()).hexdigest()[:16]


def _digest(folder: Path) -> str:
    return sha256(str(folder.resolve()).encode()).hexdigest()


def _has_key() -> bool:
    import wandb

    return bool(os.environ.get("WANDB_API_KEY")) or bool(wandb.login(prompt=False, verify=False))


def _start(options: Mapping[str, Any], settings: Mapping[str, Any], own: WandbLogger | None) -> WandbTracker:
    import wandb

    manner: dict[str, Any] = {"silent": True, "finish_timeout_raises": True}
    for name in ("init_timeout", "finish_timeout"):
        if f"WANDB_{name.upper()}" not in os.environ:
            manner[name] = PATIENCE
    resume = {"resume": "allow"} if options["mode"] == "online" else {}
    arguments = {"settings": manner, **options, **resume, "reinit": "create_new"}
    arguments["config"] = {**settings, **redacted(options.get("config") or {})}
    with _command_line([*sys.argv[:1], *redacted_words(sys.argv[1:])]):
        run = wandb.init(**arguments)
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    if own is None:
        return WandbTracker(WandbLogger(experiment=run))
    own._experiment = run
    return WandbTracker(own)


@contextmanager
def _command_line(words: list[str]) -> Iterator[None]:
    """Lets wandb log these words as the command line, in place of what was typed."""
    typed, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = typed


def _left_out(error: Exception) -> None:
    print(f"wandb is left out: {_first_line(error)}; metrics.csv has everything")


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return str(redacted(lines[0])) if lines else type(error).__name__


@contextmanager
def environment_variable(name: str, value: str) -> Iterator[None]:
    """Sets an environment variable for a while, for this process and those it starts meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
