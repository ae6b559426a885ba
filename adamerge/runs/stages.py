"""Stages: a method that is a folder of configurations, run in order in one run folder, each from the file before it."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adamerge.errors import AdamergeError, ConfigError
from adamerge.io.atomic import staged_file, write_json
from adamerge.io.run_folder import COEFFICIENTS, CONFIG, STAGES, run_of
from adamerge.io.task_vector_file import FOLDER
from adamerge.io.untrusted_files import read_json
from adamerge.io.unwritten import IMPORTANCE, PREVIOUS, RUN, TASK_VECTORS
from adamerge.runs.class_names import class_named
from adamerge.runs.command_line import told_apart
from adamerge.runs.config_files import read_config
from adamerge.runs.configuration import Configuration, configurations
from adamerge.runs.parser import read, read_first
from adamerge.runs.preparation import checked, validated
from adamerge.runs.run_config import write_config
from adamerge.runs.run_folders import (
    RUN_ID,
    in_use,
    is_first_process,
    locked,
    other_length,
    refuse_used,
    run_folder,
    summary_of,
)
from adamerge.solvers import TaskVectorWriter

FINAL = (COEFFICIENTS, "heatmap.png", "allocation.json", "environment.json", CONFIG)
"""Files of the last stage that are copied to the run's folder, in this order: the last one marks the run as there."""
IMPORTANCES = "importance.json"
"""File with the importances of tensors, in the folder of a stage whose successor asks for them."""
PATIENCE = (
    7200  # seconds for the first process to check all stages, which reads the data, and to write what the others read
)


def fit(arguments: Sequence[str], resume: Path | None = None, allow_resume_difference: bool = False) -> Path | None:
    """Learns coefficients as ``runs.fit`` does, also by stages: a folder ``1_*.yaml, 2_*.yaml, ...`` may be the method.

    The stages share the other configurations and the overrides; ``--2.model.search.lr=0.1`` is for the second alone. In a
    stage's file ``{previous}`` stands for the coefficient file of the stage before, ``{importance}`` for the importances of
    its tensors, ``{task_vectors}`` for the file of the last stage that had a solver, ``{run}`` for the run's folder. Each
    stage is a run in ``RUN/1_.../``, ``RUN/2_.../``; what the last one made is copied to ``RUN``. All files are checked
    before the first stage begins, and finished stages are not repeated.

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
        if not (resume / STAGES).is_file():
            from adamerge.runs.fit import fit as resumed

            return resumed(arguments, resume, allow_resume_difference)
        return _run(resume, allow_resume_difference, _longer(resume, arguments))
    words = told_apart(arguments)
    stages = configurations(words)
    every = checked(stages)  # of all stages, before Lightning is imported
    settings, parts = every[0]
    folder = run_folder(settings, words.files)
    if not words.folders or settings.trainer.fast_dev_run:
        from adamerge.runs.fit import run

        with stages[0].named():
            return run(settings, folder, parts)
    refuse_used(folder)
    if is_first_process():
        validated(stages)
        with locked(folder):
            refuse_used(folder)  # another process may have been quicker
            _record(stages, folder)
    try:
        return _run(folder, allow_resume_difference)
    except AdamergeError:
        if is_first_process() and not in_use(folder):
            _forget(folder, [stage.file for stage in stages if stage.file is not None])
        raise


def _record(stages: Sequence[Configuration], folder: Path) -> None:
    """Writes every stage's whole configuration, so that a resumed run goes on as it was begun."""
    top, files = run_of(folder / CONFIG), [stage.file for stage in stages if stage.file is not None]
    every: list[Any] = []
    vectors: dict[str, str] = {}  # of the last stage with a solver, once there is one
    for number, (stage, file) in enumerate(zip(stages, files, strict=True)):
        paths = {RUN: str(top), **vectors}
        if number > 0:
            before = top / files[number - 1].stem
            paths |= {PREVIOUS: str(before / COEFFICIENTS), IMPORTANCE: str(before / IMPORTANCES)}
        settings = read(stage.placed(paths))
        every.append(settings)
        if settings.model.solver is not None:
            solver = class_named("model.solver", settings.model.solver.class_path, TaskVectorWriter)
            vectors = {TASK_VECTORS: str(top / file.stem / FOLDER / f"{solver.file}.safetensors")}
    folder.mkdir(parents=True, exist_ok=True)
    for file, settings in zip(files, every, strict=True):
        write_config(settings, folder / file.name)
    write_json(folder / STAGES, {"stages": [file.stem for file in files]})  # last: it says that a run is there


def _forget(folder: Path, files: Sequence[Path]) -> None:
    """Removes the record of a run whose first stage was refused before it began, so that nothing is left of it."""
    if (folder / files[0].stem / CONFIG).is_file():
        return
    for name in (STAGES, "summary.json", ".lock", *(file.name for file in files)):
        (folder / name).unlink(missing_ok=True)
    for directory in (folder, folder.parent, folder.parent.parent):  # RUNS/NAME/ID
        try:
            directory.rmdir()
        except OSError:  # others are in it
            return


def _longer(folder: Path, arguments: Sequence[str]) -> dict[int, list[str]]:
    """Returns the stage of a run that is to have another number of steps, with the override that says so.

    Raises:
        ConfigError: something else is asked to change; or a stage that others have built on, or that has not begun.
    """
    if not arguments:
        return {}
    stages = _stages(folder)
    begun = [number for number, stage in enumerate(stages, 1) if (stage / CONFIG).is_file()]
    last = begun[-1] if begun else 1
    given = re.match(r"--(\d+)\.(trainer\.max_steps.*)", arguments[0])
    if given is None or int(given[1]) != last or not begun:
        raise ConfigError(
            f"--resume takes the run's own configuration, and cannot change {arguments[0]}",
            expected=f"nothing else, or --{last}.trainer.max_steps=N for more steps of the stage that the run is in",
            got=" ".join(arguments),
            todo="start a new run: what the stages have built on each other would change",
        )
    words = [f"--{given[2]}", *arguments[1:]]
    other_length(stages[last - 1], words)  # refused before anything is touched
    return {last: words}


def _run(folder: Path, allow_difference: bool, longer: Mapping[int, Sequence[str]] | None = None) -> Path:
    from adamerge.runs.fit import fit as fit_one
    from adamerge.runs.fit import run
    from adamerge.training.wandb_run import environment_variable, grouped

    stages, longer = _stages(folder), longer or {}
    with locked(folder), grouped(folder), environment_variable(RUN_ID, os.environ.get(RUN_ID) or folder.name):
        for number, stage in enumerate(stages, 1):
            if summary_of(stage).get("status") == "finished" and number not in longer:
                continue
            configuration = folder / f"{stage.name}.yaml"
            if is_first_process():
                print(f"stage {number} of {len(stages)}: {stage.name}")
                _gather(folder, stages)
                if number > 1:
                    _weigh(configuration, stages[number - 2])
            _together()
            try:
                if (stage / CONFIG).is_file():
                    fit_one(longer.get(number, []), stage, allow_difference)
                else:
                    run(read_first(["--config", str(configuration)]), stage)
            finally:
                if is_first_process():
                    _gather(folder, stages)
            _together()
            if summary_of(stage).get("status") == "stopped":
                break  # the next builds on all of its steps
        if is_first_process():
            _gather(folder, stages)
    return folder


def _stages(folder: Path) -> list[Path]:
    end = time.monotonic() + PATIENCE
    while not is_first_process() and not (folder / STAGES).is_file() and time.monotonic() < end:
        time.sleep(0.1)
    return [folder / name for name in read_json(folder / STAGES)["stages"]]


def _weigh(configuration: Path, before: Path) -> None:
    """Writes the importances of the stage before, when the configuration of this one asks for them."""
    target = run_of(configuration) / before.name / IMPORTANCES
    if _names(read_config(configuration), str(target)) and not target.is_file():
        from adamerge.artifacts.importance import write_importances

        write_importances(before / COEFFICIENTS, target)


def _names(content: Any, value: str) -> bool:
    if isinstance(content, dict | list):
        return any(_names(item, value) for item in (content.values() if isinstance(content, dict) else content))
    return bool(content == value)


def _together() -> None:
    """Waits for the other processes, where there are any: a stage reads what the one before has written."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _gather(folder: Path, stages: Sequence[Path]) -> None:
    """Writes the run's summary of its stages; when all are finished, copies the last one's files to the run's folder."""
    summaries = {stage.name: summary_of(stage) for stage in stages}
    statuses = [summary.get("status", "running") for summary in summaries.values()]
    ended = [status for status in statuses if status not in {"finished", "running"}]
    status = ended[0] if ended else "finished" if set(statuses) == {"finished"} else "running"
    begun = [summary for summary in summaries.values() if summary]
    last, old = begun[-1] if begun else {}, summary_of(folder)
    # scores that were written into it later stay, as long as they are of these coefficients
    same = old.get("step") == last.get("step")
    scores: dict[str, Any] = {key: old[key] for key in ("test", "validation") if same and key in old}
    write_json(folder / "summary.json", {**scores, **last, "status": status, "stages": summaries})
    if status == "finished":
        for name in FINAL:
            if (stages[-1] / name).is_file():
                with staged_file(folder / name) as temporary:
                    shutil.copyfile(stages[-1] / name, temporary)
