"""One folder a run: made, locked, resumed; with the loggers, callbacks and the record of where it ran."""

from __future__ import annotations

import csv
import logging
import os
import platform
import secrets
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from filelock import FileLock, Timeout
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

import adamerge
from adamerge.callbacks import (
    AtomicCheckpoints,
    CoefficientFile,
    CollapseGuard,
    PatientWandb,
    Summary,
    draw_heatmap,
    write_json,
)
from adamerge.coefficients import save_coefficients
from adamerge.data import Calibration
from adamerge.errors import AdamergeError, CheckpointError, ConfigError
from adamerge.files import read_json
from adamerge.modules import AdaptiveMerging

WANDB_PATIENCE = 20  # seconds for the server's first answer
RUN_ID = "ADAMERGE_RUN_ID"  # environment variable; set it where something other than Lightning starts the processes
SAME_ON_RESUME = ("adamerge", "torch", "threads", "world_size", "device")


class ConfigCLI(LightningCLI):
    """The configuration of a run: ``--config POOL --config METHOD`` and overrides, to model, data and trainer settings.

    Args:
        args: command line.

    """

    def __init__(self, args: Sequence[str]) -> None:
        _quieten()
        super().__init__(
            AdaptiveMerging,
            Calibration,
            subclass_mode_data=True,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            run=False,
            args=list(args),
            parser_kwargs={"prog": "adamerge fit", "exit_on_error": True},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Where the run's folder is."""
        parser.add_argument("--runs", default="runs", help="folder of all runs")
        parser.add_argument("--name", type=str | None, default=None, help="of the run; by default the configs' names")
        parser.add_argument("--id", type=str | None, default=None, help="of this run of that name; by default the time")
        parser.set_defaults(
            {
                "trainer.max_epochs": 1,
                "trainer.log_every_n_steps": 10,
                "trainer.num_sanity_val_steps": 0,
                "trainer.use_distributed_sampler": False,
                "trainer.enable_model_summary": False,
            }
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Later: the run's folder is made only when everything else has been checked."""
        return None  # type: ignore[return-value]

    def trainer_with(self, **kwargs: Any) -> Trainer:
        """The configured trainer, with these arguments added."""
        return super().instantiate_trainer(**kwargs)

    @property
    def settings(self) -> Any:
        """The parsed configuration."""
        return self.config


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

    """
    if resume is not None:
        if arguments:
            raise ConfigError(f"--resume takes the run's own configuration, and cannot change {arguments[0]}")
        if not (resume / "config.yaml").is_file():
            raise ConfigError(f"{resume} is not a run's folder: it has no config.yaml")
        arguments = ["--config", str(resume / "config.yaml")]
    cli = ConfigCLI(arguments)
    module: AdaptiveMerging = cli.model
    data: Calibration = cli.datamodule
    module.merged.task_vectors.check()
    if cli.settings.trainer.fast_dev_run:
        cli.trainer_with(callbacks=[], logger=False).fit(module, data)
        return None
    if module.objective is not None:
        if cli.settings.trainer.max_steps < 1:
            raise ConfigError(
                "trainer.max_steps is not set: how long should the fit be?", todo="--trainer.max_steps=500"
            )
        for task in data.tasks:
            data.rows(task, "calibration")
    name, identity = cli.settings.name or _name(arguments), cli.settings.id or os.environ.get(RUN_ID) or _new_id()
    folder = resume or Path(cli.settings.runs) / name / identity
    if resume is None and (folder / "config.yaml").exists() and _is_first_process():
        raise ConfigError(
            f"{folder} holds a run already", todo=f"resume it with --resume {folder}, or choose another --id"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if resume is None and _is_first_process():
            cli.parser.save(cli.config, folder / "config.yaml", skip_check=True, overwrite=True)
        if module.objective is None:
            _write_initial(module, folder)
        else:
            _search(cli, module, data, folder, resume is not None, allow_resume_difference)
    return folder


def _search(
    cli: ConfigCLI, module: AdaptiveMerging, data: Calibration, folder: Path, resumed: bool, allow_difference: bool
) -> None:
    checkpoint = _last_checkpoint(folder) if resumed else None
    checkpoints = ModelCheckpoint(
        folder / "checkpoints",
        filename="{step}",
        monitor="step",
        mode="max",
        save_top_k=2,
        save_last=True,
        every_n_train_steps=_checkpoint_interval(cli.settings.trainer.max_steps),
        enable_version_counter=False,
        save_on_train_epoch_end=False,
    )
    trainer = cli.trainer_with(
        logger=False,
        callbacks=[
            *(cli.config_init.trainer.callbacks or ()),
            checkpoints,
            CollapseGuard(),
            CoefficientFile(folder),
            Summary(folder),
        ],
        plugins=[AtomicCheckpoints()],
        default_root_dir=str(folder),
    )
    environment = _environment(trainer)
    if checkpoint is not None and not allow_difference:
        _compare_environment(folder, environment)
    if _is_first_process():
        write_json(folder / "environment.json", environment)
    history = CSVLogger(folder, name="", version="")
    if checkpoint is not None and _is_first_process():
        _keep_metrics(history, folder / "metrics.csv", _step(checkpoint))
    wandb = _wandb(folder)
    trainer.loggers = [history] if wandb is None else [history, wandb]
    with _announced(folder.name):
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)


def _write_initial(module: AdaptiveMerging, folder: Path) -> None:
    """A method without an objective: its coefficients are the initial ones, and no data are opened."""
    coefficients = module.coefficients()
    save_coefficients(coefficients, folder / "coefficients.safetensors")
    draw_heatmap(coefficients.table(), folder / "heatmap.png", "Merging coefficients (not learned)")
    write_json(folder / "environment.json", _environment(None))
    write_json(folder / "summary.json", {"status": "finished", "step": 0, "protocol": {}, "metrics": {}})


def _quieten() -> None:
    """Leave out what libraries say that is no news to our users."""
    for text in ("args parameter is intended", "LeafSpec", "exists and is not empty", "does not have many workers"):
        warnings.filterwarnings("ignore", f".*{text}.*")
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _name(arguments: Sequence[str]) -> str:
    """``testbed_images-adamerging_layer_wise`` for the configs of those names."""
    paths = [arguments[i + 1] for i, argument in enumerate(arguments[:-1]) if argument in {"--config", "-c"}]
    paths += [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]
    paths.sort(key=lambda path: Path(path).parent.name != "pools")  # the pool first, in whatever order they were given
    stems = [Path(path).stem for path in paths if Path(path).parent.name != "trainer"]
    return "-".join(stems) or "run"


def _is_first_process() -> bool:
    """Whether this process writes for all: the others are started by Lightning, torchrun or a cluster."""
    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def _announced(identity: str) -> Iterator[None]:
    """The processes that Lightning starts for this fit inherit the environment, and with it the run's id."""
    before = os.environ.get(RUN_ID)
    os.environ[RUN_ID] = identity
    try:
        yield
    finally:
        if before is None:
            del os.environ[RUN_ID]


def _new_id() -> str:
    return time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)


def _checkpoint_interval(max_steps: int) -> int:
    return max(1, min(50, max_steps // 10))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process group at a time in a run's folder."""
    if not _is_first_process():
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


def _environment(trainer: Trainer | None) -> dict[str, Any]:
    """What decides whether numbers come out the same to the bit."""
    return {
        "adamerge": adamerge.__version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "world_size": trainer.world_size if trainer is not None else 1,
        "device": str(trainer.strategy.root_device.type) if trainer is not None else "cpu",
    }


def _compare_environment(folder: Path, environment: dict[str, Any]) -> None:
    before = read_json(folder / "environment.json")
    changed = [key for key in SAME_ON_RESUME if before.get(key) != environment[key]]
    if changed:
        raise ConfigError(
            f"{folder}: resuming would not give the same numbers: {changed[0]} changed",
            expected={key: before.get(key) for key in changed},
            got={key: environment[key] for key in changed},
            todo="run it where it ran before, or pass --allow-resume-difference",
        )


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


def _keep_metrics(logger: CSVLogger, path: Path, step: int) -> None:
    """Carry the rows of the steps that are not run again over into the new file."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", newline="") as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    kept = [row for row in rows if int(row["step"]) < step]
    logger.experiment.metrics.extend(kept)
    logger.save()


def _wandb(folder: Path) -> PatientWandb | None:
    """A logger as the environment says: online, offline or disabled; offline when there is no key or no server."""
    mode = os.environ.get("WANDB_MODE", "online")
    if mode == "disabled" or not _is_first_process():
        return None
    import wandb

    def start(how: str) -> PatientWandb:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "adamerge"),
            name=f"{folder.parent.name}/{folder.name}",
            id=folder.name,
            resume="allow" if how == "online" else None,
            dir=folder,
            mode=how,  # type: ignore[arg-type]
            settings=wandb.Settings(init_timeout=WANDB_PATIENCE, silent=True),
        )
        return PatientWandb(experiment=run)

    has_key = bool(os.environ.get("WANDB_API_KEY")) or wandb.login(prompt=False)
    try:
        return start("online" if mode == "online" and has_key else "offline")
    except Exception as error:
        print(f"wandb: {str(error).splitlines()[0] if str(error) else type(error).__name__}; logging offline instead")
    try:
        return start("offline")
    except Exception as error:
        print(f"wandb is left out: {error}; metrics.csv has everything")
        return None


__all__ = ["AdamergeError", "ConfigCLI", "fit"]
