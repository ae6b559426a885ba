"""Stages: a method that is a folder of configurations, run in order in one run folder, each from the file before it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from adamerge import runs
from adamerge.allocation import write_importances
from adamerge.config_files import config_files, read_config, stages_of
from adamerge.configuration import Parsed
from adamerge.errors import ConfigError
from adamerge.files import read_json
from adamerge.runs import RUN_ID, is_first_process, locked, run_folder
from adamerge.staging import staged_file, write_json
from adamerge.wandb_run import environment_variable, grouped

RECORD = "stages.json"
FINAL = ("coefficients.safetensors", "heatmap.png", "allocation.json", "environment.json", "config.yaml")
"""Of the last stage, also found at the run's top; what says that the run is there comes last."""
PATIENCE = 120  # seconds for the first process to write what the others read


def fit(arguments: Sequence[str], resume: Path | None = None, allow_resume_difference: bool = False) -> Path | None:
    """``runs.fit``, where one of the configurations may also be a folder of stages ``1_*.yaml, 2_*.yaml, ...``.

    The stages share the other configurations and the overrides; ``--2.model.lr=0.1`` is for the second alone. In a stage's
    file ``{previous}`` stands for the coefficient file of the stage before, ``{importance}`` for the importances of its
    tensors, ``{run}`` for the run's folder. Each stage is a run in ``RUN/1_.../``, ``RUN/2_.../``; what the last one made
    is also found in ``RUN``. All files are checked before the first stage begins, and finished stages are not repeated.

    Args:
        arguments: as on the command line.
        resume: a run's folder.
        allow_resume_difference: resume although versions, threads or devices differ.

    Returns:
        The run's folder; None after a ``fast_dev_run``, which is one of the first stage.

    Raises:
        AdamergeError: as ``runs.fit``; or a folder that holds no stages, or overrides of a stage that is not there.
    """
    if resume is not None:
        if arguments or not (resume / RECORD).is_file():
            return runs.fit(arguments, resume, allow_resume_difference)
        return _run(resume, allow_resume_difference)
    files = stage_files(arguments)
    if not files:
        return runs.fit(arguments)
    settings = _parsed(arguments, files[0], 1, {}).config
    if settings.trainer.fast_dev_run:
        return runs.fit(for_stage(arguments, files[0], 1))
    folder = run_folder(settings, arguments)
    if is_first_process():
        if (folder / RECORD).exists() or (folder / "config.yaml").exists():
            raise ConfigError(
                f"{folder} holds a run already", todo=f"resume it with --resume {folder}, or choose another --id"
            )
        _record(arguments, files, folder)
    return _run(folder, allow_resume_difference)


def started(folder: Path) -> bool:
    """Whether a run, of one or several stages, has begun there and can be resumed."""
    return (folder / RECORD).is_file() or (folder / "config.yaml").is_file()


def stage_files(arguments: Sequence[str]) -> list[Path]:
    """The stages of the method that is a folder, in order; none when all configurations are files.

    Raises:
        ConfigError: two folders, or a folder whose YAML files are not ``1_*.yaml, 2_*.yaml, ...``.
    """
    folders = [Path(path) for path in config_files(arguments) if Path(path).is_dir()]
    if len(folders) > 1:
        raise ConfigError(f"--config: at most one folder of stages, got {[str(folder) for folder in folders]}")
    if not folders:
        return []
    return stages_of(folders[0])


def for_stage(arguments: Sequence[str], file: Path | None, number: int) -> list[str]:
    """The arguments of one stage, its own overrides last; ``file`` takes the folder's place."""
    common: list[str] = []
    own: list[str] = []
    words = iter(arguments)
    for word in words:
        given = re.match(r"--(\d+)\.(.+)", word)
        if given:
            rest = [] if "=" in word else [next(words, "")]
            own += [f"--{given[2]}", *rest] if int(given[1]) == number else []
        elif file is not None and Path(word.removeprefix("--config=")).is_dir() and _is_config(word, common):
            common.append(f"--config={file}" if word.startswith("--config=") else str(file))
        else:
            common.append(word)
    return [*common, *own]


def _is_config(word: str, before: Sequence[str]) -> bool:
    return word.startswith("--config=") or (bool(before) and before[-1] in {"--config", "-c"})


def _parsed(arguments: Sequence[str], file: Path, number: int, places: Mapping[str, str]) -> Parsed:
    """The stage's configuration, checked, with what stands for files replaced.

    Raises:
        ConfigError: a key or a value cannot be used; or the first stage speaks of a stage before it.
    """
    content = _replaced(read_config(file), places)
    if number == 1 and any(mark in yaml.safe_dump(content) for mark in ("{previous}", "{importance}")):
        raise ConfigError(f"{file}: the first stage has no stage before it", expected="no {previous}, no {importance}")
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / file.name
        copy.write_text(yaml.safe_dump(content), encoding="utf-8")
        try:
            return Parsed(for_stage(arguments, copy, number))
        except ConfigError as error:
            todo = (
                error.todo
                if number == 1
                else f"{error.todo or ''} (--{number}.KEY is for stage {number} alone)".strip()
            )
            raise ConfigError(
                f"stage {number}, {file}: {error.what}", expected=error.expected, got=error.got, todo=todo
            ) from error


def _replaced(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, places) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, places) for item in value]
    if isinstance(value, str):
        for mark, place in places.items():
            value = value.replace(mark, place)
    return value


def _record(arguments: Sequence[str], files: Sequence[Path], folder: Path) -> None:
    """Write every stage's whole configuration, so that a resumed run goes on as it was begun."""
    top = folder.absolute()
    unknown = {found[1] for word in arguments if (found := re.match(r"--(\d+)\.", word))}
    unknown -= {str(number) for number in range(1, len(files) + 1)}
    if unknown:
        raise ConfigError(
            f"there is no stage {min(unknown)} to override", expected=f"1 to {len(files)}", got=min(unknown)
        )
    parsed = []
    for number, file in enumerate(files, 1):
        places = {"{run}": str(top)}
        if number > 1:
            before = top / files[number - 2].stem
            places |= {"{previous}": str(before / FINAL[0]), "{importance}": str(before / "importance.json")}
        cli = _parsed(arguments, file, number, places)
        cli.config.runs, cli.config.name, cli.config.id = str(folder.parent), folder.name, file.stem
        parsed.append(cli)
    folder.mkdir(parents=True, exist_ok=True)
    for file, cli in zip(files, parsed, strict=True):
        cli.parser.save(cli.config, folder / file.name, skip_none=False, skip_check=True, overwrite=True)
    write_json(folder / RECORD, {"stages": [file.stem for file in files]})


def _run(folder: Path, allow_difference: bool) -> Path:
    stages = _stages(folder)
    with locked(folder), grouped(folder), environment_variable(RUN_ID, os.environ.get(RUN_ID) or folder.name):
        for number, stage in enumerate(stages, 1):
            if _summary(stage).get("status") == "finished":
                continue
            configuration = folder / f"{stage.name}.yaml"
            if is_first_process():
                print(f"stage {number} of {len(stages)}: {stage.name}")
                _gather(folder, stages)
                if number > 1:
                    _weigh(configuration, stages[number - 2])
            _together()
            try:
                if (stage / "config.yaml").is_file():
                    runs.fit([], stage, allow_difference)
                else:
                    runs.fit(["--config", str(configuration)])
            finally:
                if is_first_process():
                    _gather(folder, stages)
        if is_first_process():
            _gather(folder, stages)
    return folder


def _stages(folder: Path) -> list[Path]:
    end = time.monotonic() + PATIENCE
    while not is_first_process() and not (folder / RECORD).is_file() and time.monotonic() < end:
        time.sleep(0.1)
    return [folder / name for name in read_json(folder / RECORD)["stages"]]


def _weigh(configuration: Path, before: Path) -> None:
    """Write the importances of the stage before, when this one asks for them."""
    target = before.absolute() / "importance.json"
    if str(target) in configuration.read_text(encoding="utf-8") and not target.is_file():
        write_importances(before / FINAL[0], target)


def _together() -> None:
    """Wait for the other processes, where there are any: a stage reads what the one before has written."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _gather(folder: Path, stages: Sequence[Path]) -> None:
    """The run's summary of its stages; and, when all are finished, what the last one made."""
    summaries = {stage.name: _summary(stage) for stage in stages}
    statuses = [summary.get("status", "running") for summary in summaries.values()]
    ended = [status for status in statuses if status not in {"finished", "running"}]
    status = ended[0] if ended else "finished" if set(statuses) == {"finished"} else "running"
    begun = [summary for summary in summaries.values() if summary]
    old = _summary(folder)  # scores that were written into it later stay
    write_json(folder / "summary.json", {**old, **(begun[-1] if begun else {}), "status": status, "stages": summaries})
    if status == "finished":
        for name in FINAL:
            if (stages[-1] / name).is_file():
                with staged_file(folder / name) as temporary:
                    shutil.copyfile(stages[-1] / name, temporary)


def _summary(folder: Path) -> dict[str, Any]:
    return read_json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
