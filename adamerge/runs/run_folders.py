"""Run folders: named, free or used, locked by one process group at a time, and the newest checkpoint in them."""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from adamerge.errors import CheckpointError, ConfigError, ExportError
from adamerge.io.run_folder import CONFIG, STAGES
from adamerge.io.untrusted_files import read_json
from adamerge.runs.config_files import read_config

RUN_ID = "ADAMERGE_RUN_ID"  # environment variable; set it where something other than Lightning starts the processes


def run_folder(settings: Any, files: Sequence[str]) -> Path:
    """Returns the path ``RUNS/NAME/ID`` of a run; a name or id that is not given is made up.

    Args:
        settings: of the run.
        files: of its configuration; they give it a name where it has none.

    Raises:
        ConfigError: a name or id leads elsewhere.
    """
    identity = settings.id or os.environ.get(RUN_ID) or _new_id()
    for key, word in (("name", settings.name), ("id", identity)):
        if word is not None and (Path(word).name != word or word in {".", ".."}):
            raise ConfigError(
                f"{key}: '{word}' is no name of a folder", expected="no slash; --runs says where", got=word
            )
    return Path(settings.runs) / (settings.name or _name(files)) / identity


def started(folder: Path) -> bool:
    """Returns whether a run, of one or several stages, has begun in a folder and can be resumed."""
    return (folder / STAGES).is_file() or (folder / CONFIG).is_file()


def refuse_used(folder: Path) -> None:
    """Refuses a folder that holds a run already.

    Raises:
        ConfigError: it does.
    """
    if started(folder) and is_first_process():
        raise ConfigError(
            f"{folder} holds a run already", todo=f"resume it with --resume {folder}, or choose another --id"
        )


def refuse_ended(folder: Path) -> None:
    """Refuses a run that cannot be resumed.

    Raises:
        ConfigError: it is no run's folder; or the run diverged or collapsed, and would only do so again.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} is not a run's folder: it has no {CONFIG}")
    status = summary_of(folder).get("status")
    if status in {"diverged", "collapsed"}:
        raise ConfigError(
            f"{folder} has {status}, and would again",
            todo="start a new run, with fewer steps or a lower --model.search.lr",
        )


def summary_of(folder: Path) -> dict[str, Any]:
    """Returns a run's summary; an empty one where none has been written yet."""
    return read_json(folder / "summary.json") if (folder / "summary.json").is_file() else {}


def is_first_process() -> bool:
    """Returns whether this process writes for all: the others are started by Lightning, torchrun or a cluster."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only  # late: what is refused is told without Lightning

    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a run's folder and locks it for this process group while the block runs.

    Raises:
        ConfigError: another process has it.
        ExportError: it cannot be made.
    """
    if not is_first_process():
        yield  # the first process holds the lock for all
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(f"{folder} cannot be made: {error.strerror}", todo="choose another --runs") from error
    lock, holder = FileLock(folder / ".lock"), folder / ".holder"
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        who = holder.read_text(encoding="utf-8") if holder.is_file() else "another process"
        raise ConfigError(f"{folder} is in use by {who}", todo="wait for it, or choose another --id") from error
    try:
        holder.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def in_use(folder: Path) -> bool:
    """Returns whether another process has locked a run's folder."""
    try:
        with locked(folder):
            return False
    except ConfigError:
        return True


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the newest checkpoint that can be read; None where there is none yet, so that the run starts over.

    Raises:
        CheckpointError: none of those that are there can be read.
    """
    checkpoints = sorted(
        (folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True
    )
    for path in checkpoints:
        try:
            step_of(path)
        except CheckpointError as error:
            print(f"{error.what}; trying the one before")
            continue
        return path
    if checkpoints:
        raise CheckpointError(f"{folder / 'checkpoints'} holds no checkpoint that can be read", todo="start a new run")
    return None


def step_of(checkpoint: Path) -> int:
    """Returns the number of steps after which a checkpoint was written.

    Raises:
        CheckpointError: it cannot be read.
    """
    from adamerge.training.run_checkpoints import AtomicCheckpoints

    step: int = AtomicCheckpoints().load_checkpoint(checkpoint)["global_step"]
    return step


def other_length(folder: Path, arguments: Sequence[str]) -> int | None:
    """Returns the number of steps that a resumed run is to have; None where it keeps its own.

    Raises:
        ConfigError: something else is asked to change; or the run has done as many steps already.
    """
    if not arguments:
        return None
    words = list(arguments)
    if words[0] == "--trainer.max_steps":
        words[:2] = ["=".join(words[:2])]
    text = words[0].removeprefix("--trainer.max_steps=")
    if text == words[0] or len(words) > 1:
        raise ConfigError(
            f"--resume takes the run's own configuration, and cannot change {words[-1]}",
            expected="nothing else, or --trainer.max_steps=N for more steps",
            todo=f"start a new run from where this one is: --model.init_from={folder / 'coefficients.safetensors'}",
        )
    own = read_config(folder / CONFIG)
    if not own["model"].get("objective"):
        raise ConfigError(f"{folder} learned nothing, and has no steps to go on with", got=" ".join(arguments))
    checkpoint = last_checkpoint(folder)
    done = max(summary_of(folder).get("step", 0), 0 if checkpoint is None else step_of(checkpoint))
    if not text.strip().isdigit() or int(text) <= done:
        raise ConfigError(
            f"{folder} has done {done} steps, and cannot go on to trainer.max_steps={text}",
            expected=f"a whole number above {done}",
            got=text,
        )
    return int(text) if int(text) != own["trainer"]["max_steps"] else None


def _name(files: Sequence[str]) -> str:
    """Returns a run's name from its configs' names, such as ``testbed_images-adamerging_layer_wise``."""
    paths = [Path(path) for path in files]
    paths.sort(key=lambda path: path.parent.name != "pools")  # the pool first, in whatever order they were given
    return "-".join(path.stem for path in paths if path.parent.name != "trainer") or "run"


def _new_id() -> str:
    return time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
