"""A run: coefficients learned as configured, in a folder of its own, with the record of where; begun, gone on with, ended."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import SingleDeviceStrategy

from adamerge.artifacts.coefficients import save_coefficients
from adamerge.artifacts.heatmap import draw_heatmap
from adamerge.artifacts.importance import allocation_table
from adamerge.artifacts.recipe import describe
from adamerge.data.overlap import contents
from adamerge.io.atomic import write_json
from adamerge.io.run_folder import CONFIG, STAGES
from adamerge.merging.malloc import release_unreachable
from adamerge.merging.memory_report import print_plan
from adamerge.parametrizations import ImportanceChunkWise
from adamerge.runs.command_line import told_apart
from adamerge.runs.configuration import configurations
from adamerge.runs.early_checks import Parts
from adamerge.runs.environment import environment_of, refuse_difference
from adamerge.runs.instantiate import Configured
from adamerge.runs.parser import read
from adamerge.runs.preparation import prepared
from adamerge.runs.run_config import write_config
from adamerge.runs.run_folders import (
    RUN_ID,
    is_first_process,
    last_checkpoint,
    locked,
    other_length,
    refuse_ended,
    refuse_used,
    run_folder,
    step_of,
)
from adamerge.runs.solve import solve
from adamerge.runs.summary import Summary
from adamerge.training.callbacks import Beginning, CoefficientFile, RunawayGuard
from adamerge.training.collapse_guard import CollapseGuard
from adamerge.training.costs import Costs
from adamerge.training.fit_checks import planned
from adamerge.training.loggers import tracked
from adamerge.training.module import MergingModule
from adamerge.training.run_checkpoints import AtomicCheckpoints, SessionTimer, StepCheckpoints
from adamerge.training.tracker import hand_over
from adamerge.training.wandb_run import environment_variable


def fit(arguments: Sequence[str], resume: Path | None = None, allow_resume_difference: bool = False) -> Path | None:
    """Learns coefficients as configured, in a new run folder or the one to resume.

    Args:
        arguments: ``--config POOL --config METHOD`` and overrides, as on the command line; with ``resume`` none, or
            ``--trainer.max_steps=N`` alone.
        resume: a run's folder; its own configuration is used. With another number of steps it goes on, from where it is,
            to that number.
        allow_resume_difference: resume although versions, threads or devices differ.

    Returns:
        The run's folder; None after a ``fast_dev_run``, which leaves no files.

    Raises:
        AdamergeError: what can be wrong with configuration, models or data; nothing has been written then.
        KeyboardInterrupt: interrupted; the run can be resumed.
        SIGTERMException: terminated; likewise.
    """
    longer = False
    if resume is not None:
        refuse_ended(resume)
        steps = other_length(resume, arguments)
        longer = steps is not None
        arguments = ["--config", str(resume / CONFIG), *([f"--trainer.max_steps={steps}"] if longer else [])]
    words = told_apart(arguments)
    settings = read(configurations(words)[0])
    folder, again = resume or run_folder(settings, words.files), resume is not None
    return run(settings, folder, resumed=again, longer=longer, allow_resume_difference=allow_resume_difference)


def run(
    settings: Namespace,
    folder: Path,
    parts: Parts | None = None,
    *,
    resumed: bool = False,
    longer: bool = False,
    allow_resume_difference: bool = False,
) -> Path | None:
    """Learns coefficients as settings say; ``fit`` says what is returned and raised.

    Args:
        settings: as ``read`` returns them.
        folder: of the run.
        parts: made of the settings already; made now when None.
        resumed: whether a run in the folder is gone on with, whose own settings these are.
        longer: whether its number of steps is another than it was.
        allow_resume_difference: resume although versions, threads or devices differ.
    """
    release_unreachable()  # of an earlier fit in this process, before it is looked at what is free
    fit = prepared(settings, parts)
    module, data = fit.model, fit.datamodule
    module.merged.task_vectors.check()  # reads every weight
    if module.merging.sees_inputs and is_first_process():
        for line in data.notices(module.merged.task_vectors.checkpoints):
            print(line)
    if settings.trainer.fast_dev_run:
        if module.objective is not None:
            once = fit.trainer_with([], logger=False)
            module.teachers = module.teachers.in_memory()  # nothing stays
            _plan_printed(module, once, settings)
            once.fit(module, data)
        return None
    with ExitStack() as held:
        if resumed:
            held.enter_context(locked(folder))
        else:
            refuse_used(folder)

        def begin() -> None:
            """Writes the first files of a run; its configuration last, since a folder that has one can be resumed."""
            if not resumed:
                held.enter_context(locked(folder))
                refuse_used(folder)  # another process may have been quicker
            if not is_first_process():
                return
            if isinstance(module.merged.parametrization, ImportanceChunkWise) and not resumed:
                print(allocation_table(module.merged.parametrization))
                write_json(folder / "allocation.json", module.merged.parametrization.allocation)
            if not resumed or longer:
                write_config(settings, folder / CONFIG)

        if module.objective is None:
            _write_initial(fit, folder, begin)
        else:
            _search(fit, folder, begin, resumed, allow_resume_difference)
    return folder


def _plan_printed(module: MergingModule, trainer: Trainer, settings: Any) -> dict[str, Any]:
    """Prints the plan, keeps its storage in the configuration, by which a resumed run goes, and returns its record."""
    plan = planned(module.merged, trainer)
    if is_first_process():
        print_plan(plan, module.merging.micro_batch)
    record = plan.record()
    module.merged.choose_storage(plan.chosen)
    settings.model.storage = Namespace(**describe(plan.chosen))
    return record


def _trainer(fit: Configured, folder: Path, beginning: Beginning, summary: Summary) -> Trainer:
    trainer = fit.settings.trainer
    steps = trainer.max_steps
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
    timers = [] if trainer.max_time is None else [SessionTimer(trainer.max_time)]
    return fit.trainer_with(
        [beginning, *timers, checkpoints, CollapseGuard(), RunawayGuard(), CoefficientFile(folder), summary],
        logger=False,
        plugins=[AtomicCheckpoints()],
        default_root_dir=str(folder),
        log_every_n_steps=min(trainer.log_every_n_steps, steps),
    )


def _search(fit: Configured, folder: Path, begin: Callable[[], None], resumed: bool, allow_difference: bool) -> None:
    module, data = fit.model, fit.datamodule
    checkpoint = last_checkpoint(folder) if resumed else None
    with ExitStack() as stack:

        def begun(trainer: Trainer) -> None:
            """Begins to write and log, once all that can be known before a fit has been checked."""
            begin()
            if is_first_process():
                write_json(folder / "environment.json", environment)
                step = 0 if checkpoint is None else step_of(checkpoint)
                trainer.loggers = stack.enter_context(tracked(folder, fit.loggers, step))

        summary = Summary(folder)
        trainer = _trainer(fit, folder, Beginning(begun), summary)
        trainer.loggers = [DummyLogger()]  # callbacks ask for one before the fit begins, and with it its own
        environment = environment_of(trainer, module.merged.task_vectors, {**data.protocol, "contents": contents(data)})
        if checkpoint is not None and not allow_difference:
            refuse_difference(folder, environment)
        summary.plan = _plan_printed(module, trainer, fit.settings)
        # the processes that Lightning starts for this fit inherit the environment, and with it the run's id
        stack.enter_context(environment_variable(RUN_ID, os.environ.get(RUN_ID) or folder.name))
        whole = folder.parent if (folder.parent / STAGES).is_file() else folder
        try:
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        except SystemExit as error:
            if is_first_process():
                print(f"go on with: adamerge fit --resume {whole}")
            # an interrupt is an exit with status 1 to Lightning, and one that waits for the step's end a SIGTERM
            asked = isinstance(trainer.checkpoint_callback, StepCheckpoints) and trainer.checkpoint_callback.interrupted
            if asked or isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from error
            raise
    if is_first_process() and summary.stopped:
        print(f"{summary.stopped}; go on with: adamerge fit --resume {whole}")


def _write_initial(fit: Configured, folder: Path, begin: Callable[[], None]) -> None:
    """Writes the initial coefficients of a method without an objective; data are opened if its buffers or solver see inputs.

    Those of a method with a solver merge what the solver writes beside them.
    """
    module, costs = fit.model, Costs()
    costs.watch(module.merged)
    module.result.recalibrate(fit.datamodule, SingleDeviceStrategy("cuda" if torch.cuda.is_available() else "cpu"))
    if not is_first_process():
        return
    coefficients, told = module.coefficients(), {}
    begin()
    if module.merging.solver is not None:
        told = {"solver": describe(module.merging.solver)}
        coefficients = solve(coefficients, fit, folder, costs)
    save_coefficients(coefficients, folder / "coefficients.safetensors")
    draw_heatmap(
        coefficients.table(),
        folder / "heatmap.png",
        "Merging coefficients (not learned)",
        masks=coefficients.mask_table(),
        order=module.merged.order,
    )
    with tracked(folder, fit.loggers) as trackers:
        hand_over(trackers, coefficients, folder / "coefficients.safetensors", folder / "heatmap.png")
        for tracker in trackers:
            tracker.finalize("success")
    write_json(folder / "environment.json", environment_of(None, module.merged.task_vectors))
    took = costs.record(module.merged, learned=False)
    content = {"status": "finished", "step": 0, **took, "protocol": dict(coefficients.protocol), "metrics": {}}
    write_json(folder / "summary.json", content | told)
