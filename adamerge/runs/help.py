"""Help of a fit: our own keys first, a class's arguments by its name, near names; nothing is imported for it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from functools import cache

from adamerge.errors import nearest
from adamerge.runs.class_descriptions import Argument, Description, described, kinds_of

DEFAULT_SEARCH = "adamerge.Descent"
WIDTH = 118
USAGE = """usage: adamerge fit POOL METHOD [--key=value ...]
       adamerge fit --resume RUN [--allow-resume-difference]

Learns merging coefficients as POOL (what is merged, on which data: configs/pools) and METHOD (how: configs/methods)
say, in a new folder; or goes on with a run from its last checkpoint, or to more steps with
trainer.max_steps=N. --export FOLDER writes the merged model too. Further files are laid over these; all of them
may also be given with --config. A METHOD that is a folder has stages: --2.KEY=VALUE is for the second alone.
"""
RUN_KEYS = {
    "tasks": "of the pool's tasks only these, such as [cars,dtd]",
    "leave_out": "of the pool's experts not these",
    "seed": "of all that is drawn: the order of the data, masks, views and what else has a seed; drawn splits stay",
    "runs": "folder of all runs",
    "name": "of the run; by default the configs' names",
    "id": "of this run of that name; by default the time",
}
"""Keys of a run itself, with their help."""
TRAINER_KEYS = {
    "max_steps": "length of the fit in optimiser steps; needed where something is learned",
    "fast_dev_run": "true: one step, and nothing is written",
    "accelerator": "auto, cpu or gpu",
    "devices": "how many, or which",
    "strategy": "auto, or ddp for several devices",
    "precision": "32-true or bf16-mixed",
    "gradient_clip_val": "largest norm of a gradient",
    "callbacks": "such as KeepBest, which lets the best step be the result",
    "logger": "further loggers",
    "enable_progress_bar": "true or false",
}
"""Keys of Lightning's trainer that most fits need, with their help."""
ELSEWHERE = {
    "learning_rate": "model.search.lr",
    "steps": "trainer.max_steps",
    "epochs": "trainer.max_steps",
    "num_train_epochs": "trainer.max_steps",
    "device": "trainer.accelerator",
    "output_dir": "runs",
    "output": "runs",
    "random_seed": "seed",
    "scheduler": "model.search.schedule",
    "models": "model.task_vectors.experts",
    "experts": "model.task_vectors.experts",
    "base": "model.task_vectors.base",
    "base_model": "model.task_vectors.base",
    "network": "model.backbone",
    "loss": "model.objective",
}
"""Names that other programs use, to the keys that are meant."""


def near_key(key: str, among: Sequence[str] = ()) -> str | None:
    """Returns the key that was probably meant: by another program's word for it, by spelling, or by its last part's.

    Args:
        key: as it was given.
        among: keys that may be meant; by default all that ``adamerge fit --help`` shows.
    """
    known = list(among) or all_keys()
    meant = ELSEWHERE.get(key.rpartition(".")[2])
    if meant in known:
        return meant
    last = {one.rpartition(".")[2]: one for one in reversed(known)}
    near = nearest(key.rpartition(".")[2], last, cutoff=0.75)
    close = nearest(key, known, cutoff=0.7) or nearest(key.rpartition(".")[2], last)
    meant = last[near] if near is not None else last.get(close or "", close)
    return None if meant is not None and "." in key and "." not in meant else meant  # its group is none's key


def elsewhere(name: str) -> str | None:
    """Returns the key that ends with a name, or that other programs call so; None where there is none."""
    return next((one for one in all_keys() if one.rpartition(".")[2] == name), ELSEWHERE.get(name))


@cache
def all_keys() -> list[str]:
    """Returns the full names of the package's own keys of a fit, and of Lightning's keys that most fits need."""
    groups = {
        "model": described("Merging"),
        "model.search": described(DEFAULT_SEARCH),
        "data": described("Calibration"),
        "model.task_vectors": described("TaskVectors"),
    }
    own = [f"{group}.{one.name}" for group, about in groups.items() if about is not None for one in about.arguments]
    return [
        *own,
        *RUN_KEYS,
        "seed_everything",
        *(f"trainer.{key}" for key in TRAINER_KEYS),
        "model",
        "data",
        "trainer",
    ]


def _names(path: str) -> list[str]:
    about = described(path)
    return [one.name for one in about.arguments] if about is not None else []


def fit_help(search: str = DEFAULT_SEARCH) -> str | None:
    """Returns the help of a fit under this search; None where the package does not define it."""
    merging, about, data = described("Merging"), described(search), described("Calibration")
    if merging is None or about is None or data is None:
        return None
    return "\n".join(
        [
            USAGE,
            "how it is merged and learned",
            *(_line(f"model.{one.name}", one) for one in merging.arguments),
            "",
            f"the search ({about.name})",
            *(_line(f"model.search.{one.name}", one) for one in about.arguments),
            "",
            "data",
            *_wrapped(
                "--data", f"a class: {', '.join(kinds_of('Calibration'))}; --data.help=CLASS has all of its own keys"
            ),
            *(_line(f"data.{one.name}", one) for one in data.arguments),
            "",
            "the run",
            *(line for key, told in RUN_KEYS.items() for line in _wrapped(f"--{key}", told)),
            *_wrapped("--seed_everything=0", "of what else is drawn"),
            "",
            "the trainer: Lightning's keys; --trainer.help shows all of them",
            *(line for key, told in TRAINER_KEYS.items() for line in _wrapped(f"--trainer.{key}", told)),
            "",
            "more",
            *_wrapped("--KEY.help", "classes for a key, such as --model.objective.help"),
            *_wrapped("--KEY.help=CLASS", "what a class takes, such as --model.backbone.help=CausalLM"),
            *_wrapped("--print_config", "what would be run, as YAML"),
            "",
        ]
    )


def help_of(flag: str) -> str | None:
    """Returns the help that ``--KEY.help`` or ``--KEY.help=CLASS`` asks for; None where it is not of this package."""
    word, _, name = flag.partition("=")
    key = word.removeprefix("--").removesuffix(".help")
    if name:
        about = described(name)
        return None if about is None else _class_help(about, key)
    kind = _kind_of(key)
    classes = [about for one in kinds_of(kind) if (about := described(one)) is not None] if kind else []
    if len(classes) == 1:
        return _class_help(classes[0], key)
    if not classes:
        return None
    lines = [line for about in classes for line in _wrapped(about.name, about.told.split("\n\n")[0])]
    return "\n".join([f"--{key}=CLASS; --{key}.help=CLASS has its arguments", *lines, ""])


def _kind_of(key: str) -> str | None:
    """Returns the name of the class that a key takes; None where it takes none of the package."""
    group, *parts = key.split(".")
    kinds = {"model": ["Merging"], "data": ["Calibration"]}.get(group, [])
    for part in parts:
        owners = [about for kind in kinds for name in [kind, *kinds_of(kind)] if (about := described(name)) is not None]
        kinds = list({one.part: None for about in owners for one in about.arguments if one.name == part and one.part})
    return kinds[0] if kinds else None


def _class_help(about: Description, key: str) -> str:
    lines = [f"--{key}={about.name}", *textwrap.wrap(about.told.replace("\n\n", " "), WIDTH), ""]
    for one in about.arguments:
        lines.append(_line(f"{key}.{one.name}", one))
        field = described(one.part) if one.part and one.kind.startswith("dict[") else None
        if field is not None:
            lines.append(f"      each {field.name} has")
            lines += [_line(inner.name, inner, "      ") for inner in field.arguments]
    return "\n".join([*lines, ""])


def _line(key: str, one: Argument, indent: str = "") -> str:
    """Returns the help of one argument: its key with its default, its description, and the classes that it takes."""
    classes = [name for name in kinds_of(one.part) if name != one.part] if one.part else []
    told = f"{one.told.rstrip('.')} ({', '.join(classes)})" if classes else one.told
    shown = {None: "", "True": "=true", "False": "=false"}.get(one.default, f"={one.default}")
    start = f"{'' if indent else '--'}{key}{'' if shown == '=None' else shown}"
    return "\n".join(_wrapped(start, (told or one.kind).replace("None", "null"), indent))  # as YAML has it


def _wrapped(start: str, text: str, indent: str = "") -> list[str]:
    lead = f"  {indent}{start}"
    body = textwrap.wrap(text, WIDTH - 34 - len(indent)) or [""]
    pad = " " * (34 + len(indent))
    first = [lead] if len(lead) > len(pad) - 2 else []
    lines = [f"{pad}{line}" for line in body]
    return [*first, *lines] if first else [lead.ljust(len(pad)) + body[0], *lines[1:]]
