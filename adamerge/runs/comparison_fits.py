"""Fits of a comparison: checked all before the first one, each fitted or gone on with once, by row and seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from adamerge.data import Calibration
from adamerge.errors import AdamergeError, CollapsedError, ConfigError, DivergedError
from adamerge.runs.command_line import Words
from adamerge.runs.comparison_rows import Choices, Row, with_words
from adamerge.runs.config_files import stages_of
from adamerge.runs.configuration import configurations
from adamerge.runs.early_checks import made_subclass
from adamerge.runs.parser import read
from adamerge.runs.preparation import checked, validated
from adamerge.runs.run_folders import started, summary_of
from adamerge.runs.stages import fit as fit_stages
from adamerge.training.wandb_run import grouped

ENDED = frozenset({"finished", "diverged", "collapsed"})
"""Statuses of a fit that has ended for good and is not run again."""


class Fit(NamedTuple):
    """One fit of a comparison.

    Attributes:
        row: whose it is.
        seed: that it has; empty for its configuration's own.
        words: of the fit, all of them.
        method: file or folder.
    """

    row: str
    seed: str
    words: Words
    method: Path

    @property
    def name(self) -> str:
        """Returns what the fit is called in messages."""
        return f"{self.row}, seed {self.seed}" if self.seed else self.row


def fits_of(rows: Sequence[Row], tasks: Sequence[str], choices: Choices) -> list[Fit]:
    """Returns every fit of a comparison, row by row.

    Args:
        rows: methods with their settings.
        tasks: names of all that the pool's data have.
        choices: seeds, tasks that are left out, and forward passes.

    Raises:
        ConfigError: a task that is left out is not there, none would be left, or a search would have no step.
    """
    unknown = [task for task in choices.leave_out if task not in tasks]
    if unknown or (choices.leave_out and set(choices.leave_out) >= set(tasks)):
        what = f"the data have no task '{unknown[0]}'" if unknown else "no task is left"
        raise ConfigError(f"--leave-out: {what}", expected=f"some of {list(tasks)}", got=list(choices.leave_out))
    rest = [task for task in tasks if task not in choices.leave_out]
    less = [f"--leave_out=[{', '.join(choices.leave_out)}]", f"--data.only=[{', '.join(rest)}]"]
    fits = []
    for row in rows:
        words = with_words(row.words, *(less if choices.leave_out else ()))
        if choices.forward_passes is not None:
            words = with_words(words, *_lengths(words, choices.forward_passes))
        for seed in choices.seeds:
            fits.append(Fit(row.name, str(seed), with_words(words, f"--seed={seed}"), row.method))
        if not choices.seeds:
            fits.append(Fit(row.name, "", words, row.method))
    return fits


def check_words(fits: Sequence[Fit], folder: Path) -> None:
    """Checks of every fit that has not ended what is known while nothing is opened.

    Raises:
        AdamergeError: one cannot be fitted.
    """
    for fit in _waiting(fits, folder):
        with _named(fit):
            checked(configurations(fit.words, "compare"))


def check_fits(fits: Sequence[Fit], folder: Path) -> None:
    """Checks of every fit that has not ended what is known before any of them begins.

    Raises:
        AdamergeError: one cannot be fitted; nothing has been fitted or written then.
    """
    looked = set()
    for fit in _waiting(fits, folder):
        if fit.row not in looked:  # another seed finds the same
            with _named(fit):
                validated(configurations(fit.words, "compare"))
            looked.add(fit.row)


def fit_all(fits: Sequence[Fit], folder: Path) -> tuple[dict[str, dict[str, Path]], dict[str, str]]:
    """Fits what is not fitted yet; one that diverges or collapses, or was stopped, is left out of the table.

    Returns:
        The finished runs by row and seed, and the status of each that is left out, by its name.
    """
    runs: dict[str, dict[str, Path]] = {}
    left: dict[str, str] = {}
    for fit in fits:
        try:
            with grouped(folder):
                run = fitted(fit.method, fit.words, folder)
        except (CollapsedError, DivergedError) as error:
            print(f"{fit.name} is left out: {error.what}")
            left[fit.name] = "collapsed" if isinstance(error, CollapsedError) else "diverged"
            continue
        status = str(summary_of(run).get("status"))
        if status == "finished":
            runs.setdefault(fit.row, {})[fit.seed] = run
        else:
            print(f"{fit.name} is left out: {run} has {status}; adamerge fit --resume {run} goes on with what stopped")
            left[fit.name] = status
    return runs, left


def fitted(method: Path, words: Words, folder: Path) -> Path:
    """Returns the folder of the method's run in the comparison, which is fitted or resumed first unless it has ended.

    Args:
        method: which.
        words: of its fit.
        folder: of the comparison.
    """
    run = run_of(method, words, folder)
    if summary_of(run).get("status") in ENDED:
        return run
    if started(run):
        fit_stages([], resume=run)
        return run
    fit_stages([*words.in_order, "--runs", str(folder), "--name", "fits", "--id", run.name])
    return run


def run_of(method: Path, words: Words, folder: Path) -> Path:
    """Returns the folder of the method's run, named after a hash of its configuration: a changed one is fitted anew."""
    given = [one for file in words.files for one in (stages_of(Path(file)) if Path(file).is_dir() else [Path(file)])]
    shared = [f"--config={file}" for file in words.files[2:]]
    recipe = [*(path.read_bytes() for path in given), *(word.encode() for word in (*shared, *words.overrides))]
    digest = hashlib.sha256(b"\0".join(recipe)).hexdigest()
    return folder / "fits" / f"{method.stem}-{digest[:8]}"


def _waiting(fits: Sequence[Fit], folder: Path) -> list[Fit]:
    return [fit for fit in fits if summary_of(run_of(fit.method, fit.words, folder)).get("status") not in ENDED]


def _lengths(words: Words, passes: int) -> list[str]:
    """Returns the overrides that give a method's searches so many forward passes together, each its former share of them.

    A step of a search takes ``batch size x tasks`` of them.
    """
    every = {}
    for stage in configurations(words, "compare"):
        settings = read(stage)
        if settings.model.objective is not None:
            data = made_subclass(Calibration, settings.data)
            every[stage.number] = (data.batch_size * len(data.fitted), max(1, settings.trainer.max_steps))
    total = sum(a_step * steps for a_step, steps in every.values())
    found = []
    for number, (a_step, steps) in every.items():
        length = round(passes * steps / total)
        if length < 1:
            raise ConfigError(
                f"--forward-passes {passes}: a step of {words.files[1]} takes {a_step}, which leaves it none",
                expected=f"at least {a_step * len(every)}",
                got=passes,
            )
        found.append(f"--{f'{number}.' if number else ''}trainer.max_steps={length}")
    return found


@contextmanager
def _named(fit: Fit) -> Iterator[None]:
    """Puts the name of the method in front of an error raised in the block."""
    try:
        yield
    except AdamergeError as error:
        raise error.told_of(fit.method.name) from error


def first_runs(runs: Mapping[str, Mapping[str, Path]]) -> dict[str, Path]:
    """Returns the run of each row's first seed."""
    return {row: next(iter(own.values())) for row, own in runs.items()}
