"""The part that the testbeds' training scripts share: steps that leave whole files, measures of a merge, hashes."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adamerge.io.atomic import staged_file

LAMBDAS = tuple(step / 20 for step in range(21))
Score = Mapping[str, float]  # by task


def descend(loss: Tensor, parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, lr: float) -> float:
    """Takes one step at the learning rate ``lr``, gradients clipped to a norm of 1; returns the loss."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return loss.item()


def save(value: object, file: Path) -> None:
    """Writes a file with one rename, so that a run that was killed leaves a whole file or none."""
    with staged_file(file) as stage:
        torch.save(value, stage)


def summary(
    individual: Score, curve: Mapping[float, Score], choose: Callable[..., float], digits: int, **more: Any
) -> dict[str, Any]:
    """Returns what ``results.json`` says: scores of the base, of each expert, and of task arithmetic with one lambda.

    Args:
        individual: of each expert.
        curve: of task arithmetic, by lambda; 0 is the base.
        choose: ``max`` or ``min``, over the lambdas' means.
        digits: of a mean.
        more: what else it says.
    """
    means = {coefficient: sum(row.values()) / len(row) for coefficient, row in curve.items()}
    best = choose(means, key=means.__getitem__)
    return {
        "pretrained": curve[0.0],
        "individual": individual,
        "task_arithmetic": curve[best],
        "best_lambda": best,
        "task_arithmetic_curve": {f"{key:.2f}": round(value, digits) for key, value in means.items()},
        **more,
        "averages": {
            "pretrained": means[0.0],
            "task_arithmetic": means[best],
            "individual": sum(individual.values()) / len(individual),
        },
    }


def write_sums(out: Path, files: Iterable[Path]) -> None:
    """Writes ``SHA256SUMS`` of these files, as sha256sum reads it."""
    names = {file.relative_to(out).as_posix(): file for file in sorted(files)}
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {name}\n" for name, file in names.items()]
    (out / "SHA256SUMS").write_text("".join(lines))


def run(what: str, recipe: Any, make: Callable[[Path, Any], Mapping[str, Any]], threads: int = 2) -> None:
    """Runs a script's ``make`` from the command line: ``--out``, ``--threads``, the recipe's fields; prints averages.

    Args:
        what: is made.
        recipe: the default one, a dataclass of numbers.
        make: makes it in a folder by a recipe, and gives its results.
        threads: without ``--threads``.
    """
    parser = argparse.ArgumentParser(description=f"Make {what}.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoints and the progress files")
    parser.add_argument("--threads", type=int, default=threads)
    for field, value in asdict(recipe).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    out, threads = arguments.pop("out"), arguments.pop("threads")
    torch.set_num_threads(threads)
    print(json.dumps(make(out, type(recipe)(**arguments))["averages"], indent=2))
