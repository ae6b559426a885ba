"""One folder a run: made, locked, resumed, with the record of where it ran."""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from adamerge.allocation import allocation_table
from adamerge.callbacks import CoefficientFile, CollapseGuard, RunawayGuard, Summary
from adamerge.coefficients import save_coefficients
from adamerge.config_files import config_files
from adamerge.configuration import ConfigCLI, FitCLI
from adamerge.data import Calibration
from adamerge.environment import environment_of, refuse_difference
from adamerge.errors import CheckpointError, ConfigError
from adamerge.files import read_json
from adamerge.heatmap import draw_heatmap
from adamerge.modules import MergingModule
from adamerge.modules.checks import planned
from adamerge.parametrizations import ImportanceChunkWise
from adamerge.plan_report import print_plan
from adamerge.recipe import describe
from adamerge.run_checkpoints import AtomicCheckpoints, StepCheckpoints
from adamerge.selection import KeepBest
from adamerge.staging import write_json
from adamerge.tracker import hand_over
from adamerge.tracking import tracked
from adamerge.trainer_settings import check_length
from adamerge.wandb_run import environment_variable

RUN_ID = "ADAMERGE_RUN_ID"  # environment variable; set it where something other than Lightning starts the processes


def fit(arguments: Sequence[str], resume: Path | None = None, allow_resume_difference: bool = False) -> Path | None:
    """Learn coefficients as configured, in a new run folder or the one to resume.

    Args:
        arguments: ``--config POOL --config METHOD`` and overrides, as on the command line.
        resume: a run's folder; its own configuration is used, and overrides are refused.
        allow_resume_difference: resume although versions, threads or devices differ.

    Returns:
        The run's folder; None after a ``fast_dev_run``, which leaves no files.

    Raises:
        AdamergeError: what can be wrong with configuration, models or data; nothing has been written then.
        KeyboardInterrupt: interrupted; the run can be resumed.
        SIGTERMException: terminated; likewise.
    """
    if resume is not None:
        if arguments:
            raise ConfigError(f"--resume takes the run's own configuration, and cannot change {arguments[0]}")
        if not (resume / "config.yaml").is_file():
            raise ConfigError(f"{resume} is not a run's folder: it has no config.yaml")
        _refuse_ended(resume)
        arguments = ["--config", str(resume / "config.yaml")]
    cli = FitCLI(arguments)
    module: MergingModule = cli.model
    data: Calibration = cli.datamodule
    settings = cli.config
    module.merged.task_vectors.check()
    if module.objective is not None:
        check_length(vars(settings.trainer))
        if settings.trainer.gradient_clip_val and not module.automatic_optimization:
            raise ConfigError(
                "trainer.gradient_clip_val is not for a search with two gradients in a step", todo="leave it out"
            )
        module.check(data, str(settings.trainer.precision))
    if module.objective is not None or module.recalibrate_buffers:
        data.check(module.merged.backbone, module.objective is not None and _validates(cli))
        if is_first_process():
            for line in data.notices(module.merged.task_vectors.checkpoints):
                print(line)
    if settings.trainer.fast_dev_run:
        if module.objective is not None:
            once = cli.trainer_with([], logger=False)
            module.teachers = module.teachers.in_memory()  # nothing stays
            _plan_printed(module, once, settings)
            once.fit(module, data)
        return None
    folder = resume or run_folder(settings, arguments)
    if resume is None and (folder / "config.yaml").exists() and is_first_process():
        raise ConfigError(
            f"{folder} holds a run already", todo=f"resume it with --resume {folder}, or choose another --id"
        )
    module.coefficients().check()  # what cannot be written after the fit is known before it
    summary = Summary(folder)
    trainer = _trainer(cli, folder, summary) if module.objective is not None else None
    if trainer is not None:
        summary.plan = _plan_printed(module, trainer, settings)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if resume is None and is_first_process():
            cli.parser.save(settings, folder / "config.yaml", skip_none=False, skip_check=True, overwrite=True)
            if isinstance(module.merged.parametrization, ImportanceChunkWise):
                print(allocation_table(module.merged.parametrization))
                write_json(folder / "allocation.json", module.merged.parametrization.allocation)
        if trainer is None:
            _write_initial(module, data, folder, cli.loggers)
        else:
            _search(trainer, module, data, folder, resume is not None, allow_resume_difference, cli.loggers)
    return folder


def _validates(cli: ConfigCLI) -> bool:
    """Whether the fit looks at the validation split: to report, or to choose the step that is the result."""
    own = cli.config_init.trainer.callbacks or ()
    return cli.config.trainer.limit_val_batches != 0 or any(isinstance(callback, KeepBest) for callback in own)


def _refuse_ended(folder: Path) -> None:
    """A run that diverged or collapsed would only do so again."""
    status = read_json(folder / "summary.json").get("status") if (folder / "summary.json").is_file() else None
    if status in {"diverged", "collapsed"}:
        raise ConfigError(
            f"{folder} has {status}, and would again",
            todo="start a new run, with fewer steps or a lower --model.lr",
        )


def _plan_printed(module: MergingModule, trainer: Trainer, settings: Any) -> dict[str, Any]:
    """Print the plan; the storage it chooses becomes part of the run's own configuration, which a resumed run goes by."""
    plan = planned(module.merged, trainer)
    if is_first_process():
        print_plan(plan, module.micro_batch)
    record = plan.record()
    module.merged.storage = plan.chosen
    settings.model.storage = Namespace(**describe(plan.chosen))
    return record


def _trainer(cli: ConfigCLI, folder: Path, summary: Summary) -> Trainer:
    steps = cli.config.trainer.max_steps
    checkpoints = StepCheckpoints(
        folder / "checkpoints",
        filename="{step}",
        monitor="step",
        mode="max",
        save_top_k=2,
        save_last=True,
        every_n_train_steps=max(1, min(50, steps // 10)),
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    return cli.trainer_with(
        [checkpoints, CollapseGuard(), RunawayGuard(), CoefficientFile(folder), summary],
        logger=False,
        plugins=[AtomicCheckpoints()],
        default_root_dir=str(folder),
        log_every_n_steps=min(cli.config.trainer.log_every_n_steps, steps),
    )


def _search(
    trainer: Trainer,
    module: MergingModule,
    data: Calibration,
    folder: Path,
    resumed: bool,
    allow_difference: bool,
    loggers: Any,
) -> None:
    checkpoint = _last_checkpoint(folder) if resumed else None
    environment = environment_of(trainer, module.merged.task_vectors, data.protocol)
    if checkpoint is not None and not allow_difference:
        refuse_difference(folder, environment)
    with ExitStack() as stack:
        if is_first_process():
            write_json(folder / "environment.json", environment)
            step = 0 if checkpoint is None else _step(checkpoint)
            trainer.loggers = stack.enter_context(tracked(folder, loggers, step))
        # the processes that Lightning starts for this fit inherit the environment, and with it the run's id
        stack.enter_context(environment_variable(RUN_ID, os.environ.get(RUN_ID) or folder.name))
        try:
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        except SystemExit as error:
            # an interrupt is an exit with status 1 to Lightning, and one that waits for the step's end a SIGTERM
            asked = isinstance(trainer.checkpoint_callback, StepCheckpoints) and trainer.checkpoint_callback.interrupted
            if asked or isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            raise


def _write_initial(module: MergingModule, data: Calibration, folder: Path, loggers: Any) -> None:
    """A method without an objective: its coefficients are the initial ones; data are opened for its buffers, if at all."""
    module.finish(data, SingleDeviceStrategy("cuda" if torch.cuda.is_available() else "cpu"))
    coefficients = module.coefficients()
    save_coefficients(coefficients, folder / "coefficients.safetensors")
    draw_heatmap(coefficients.table(), folder / "heatmap.png", "Merging coefficients (not learned)")
    with tracked(folder, loggers) as trackers:
        hand_over(trackers, coefficients, folder / "coefficients.safetensors", folder / "heatmap.png")
        for tracker in trackers:
            tracker.finalize("success")
    write_json(folder / "environment.json", environment_of(None, module.merged.task_vectors))
    write_json(
        folder / "summary.json",
        {"status": "finished", "step": 0, "protocol": dict(coefficients.protocol), "metrics": {}},
    )


def run_folder(settings: Any, arguments: Sequence[str]) -> Path:
    """``RUNS/NAME/ID``, with names and ids that are not given made up."""
    identity = settings.id or os.environ.get(RUN_ID) or _new_id()
    return Path(settings.runs) / (settings.name or _name(arguments)) / identity


def _name(arguments: Sequence[str]) -> str:
    """``testbed_images-adamerging_layer_wise`` for the configs of those names."""
    paths = [Path(path) for path in config_files(arguments)]
    paths.sort(key=lambda path: path.parent.name != "pools")  # the pool first, in whatever order they were given
    return "-".join(path.stem for path in paths if path.parent.name != "trainer") or "run"


def is_first_process() -> bool:
    """Whether this process writes for all: the others are started by Lightning, torchrun or a cluster."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _new_id() -> str:
    return time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process group at a time in a run's folder."""
    if not is_first_process():
        yield  # the first process holds the lock for all
        return
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


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that can be read; None where there is none yet, so that the run starts over."""
    found = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in found:
        try:
            AtomicCheckpoints().load_checkpoint(path)
        except CheckpointError as error:
            print(f"{error.what}; trying the one before")
            continue
        return path
    if found:
        raise CheckpointError(f"{folder / 'checkpoints'} holds no checkpoint that can be read", todo="start a new run")
    return None


def _step(checkpoint: Path) -> int:
    step: int = AtomicCheckpoints().load_checkpoint(checkpoint)["global_step"]
    return step
