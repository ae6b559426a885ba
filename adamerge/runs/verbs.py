"""Verbs that take a pool and a method: fit, check and compare; wrong words are told before a library is loaded."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from adamerge.errors import ExportError
from adamerge.merging.malloc import keep_freed_memory
from adamerge.runs.command_line import Words, told_apart
from adamerge.runs.comparison_rows import Choices, is_run, rows_of, with_words
from adamerge.runs.configuration import Configuration, configurations
from adamerge.runs.help import fit_help, help_of


def import_from_here() -> None:
    """Lets configurations name classes of modules in the working directory, after all that is installed."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def fit(arguments: list[str]) -> None:
    """Learns coefficients, or goes on with a run."""
    parser = argparse.ArgumentParser(prog="adamerge fit", add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--allow-resume-difference", action="store_true")
    parser.add_argument("--export", type=Path)
    own, rest = parser.parse_known_args(arguments)
    words = told_apart(rest if arguments else ["--help"])
    text = _help_of_fit(words)
    if text is not None:
        print(text, end="")
        return
    if own.resume is None:
        stages = configurations(words)  # told before torch is imported
        if any(flag.startswith("--print_config") for flag in words.flags):
            print_config(stages[0], words.flags)
            return
    if own.export is not None and own.export.exists():
        raise ExportError(f"{own.export} exists", todo="name another folder, or export the run with --overwrite")
    import_from_here()
    keep_freed_memory()
    from adamerge.io.run_folder import COEFFICIENTS
    from adamerge.runs.run_folders import is_first_process
    from adamerge.runs.stages import fit as run_fit

    folder = run_fit(words.in_order, own.resume, own.allow_resume_difference)
    if folder is None or not is_first_process() or not (folder / COEFFICIENTS).is_file():  # it was stopped
        return
    if own.export is None:
        print(f"run: {folder}\nexport it with: adamerge export {folder / 'coefficients.safetensors'} merged/")
        return
    from adamerge.artifacts.export import export
    from adamerge.runs.scoring import run_coefficients

    print(f"run: {folder}\nexported: {export(run_coefficients(folder), own.export)}")


def print_config(stage: Configuration, flags: Sequence[str]) -> None:
    """Prints a stage's whole configuration as YAML; without defaults where a flag says so."""
    import_from_here()
    import yaml

    from adamerge.runs.parser import as_data, read

    print(yaml.safe_dump(as_data(read(stage), "--print_config=skip_default" in flags), sort_keys=False), end="")


def _help_of_fit(words: Words) -> str | None:
    """Returns the help that the flags ask for; None where they ask for none."""
    search = [word.partition("=")[2] for word in words.overrides if word.startswith("--model.search=")][-1:]
    for flag in words.flags:
        if flag in {"-h", "--help"}:
            return fit_help(*search)
        if flag == "--trainer.help":
            from adamerge.runs.parser import trainer_help

            return trainer_help()
        if flag.partition("=")[0].endswith(".help"):
            text = help_of(flag)
            if text is None:  # of a class from elsewhere
                import_from_here()
                from adamerge.runs.parser import help_by_parser

                return help_by_parser(flag, *search)
            return text
    return None


def check(arguments: list[str]) -> None:
    """Says before a fit, from headers alone, what would fail and what it would take.

    Nothing is downloaded but LoRA adapters, no weight is read and no network built. Listed are all experts, with
    everything that keeps them from being merged with the base; the number of coefficients; the predicted peak memory
    of every storage, and which would be chosen on this machine.
    """
    parser = argparse.ArgumentParser(
        prog="adamerge check",
        usage="adamerge check POOL METHOD [FILE ...] [--key=value ...]",
        description=inspect.cleandoc(check.__doc__ or ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Further --key=value are those of fit; --2.key=value is for the second stage. Exit code: 0 when nothing\n"
        "speaks against a fit, 2 for the configuration, 3 for base or experts. Too little memory is a warning: the fit\n"
        "may be meant for another machine.",
    )
    parser.add_argument("POOL", help="what is merged: configs/pools/*.yaml")
    parser.add_argument("METHOD", help="how: configs/methods/*.yaml, or a folder of stages")
    parser.add_argument("FILE", nargs="*", default=[], help="further configurations, such as configs/tasks/*.yaml")
    words = told_apart(arguments)
    if words.flags or not words.files:
        parser.parse_args(words.flags)
    stages = configurations(words, "check")
    import_from_here()
    from adamerge.runs.check import check as run_check

    run_check(stages)


def compare(arguments: list[str]) -> None:
    """Fits several methods on one pool and prints one table, beside the base, the experts and tuned task arithmetic.

    The table is written as JSON, CSV, Markdown and LaTeX, with a figure of score against seconds. What has been fitted and
    scored in the folder is not repeated, so that a command that was ended may be given again.
    """
    options, parser = compare_parsers()
    own, rest = options.parse_known_args(arguments)
    words = told_apart(rest)
    configs = parser.parse_args([*words.files, *words.flags])
    methods = [path for path in configs.methods if not is_run(path)]
    runs = tuple(path for path in configs.methods if is_run(path))
    shared = Words(own.config, words.overrides)
    for row in rows_of(configs.pool, methods, shared, own.grid):
        for number in own.seeds or [None]:
            configurations(row.words if number is None else with_words(row.words, f"--seed={number}"), "compare")
    import_from_here()
    keep_freed_memory()
    from adamerge.runs.compare import compare as run_compare
    from adamerge.runs.compare import print_table

    choices = Choices(
        runs=runs,
        seeds=tuple(own.seeds),
        grid=tuple(own.grid),
        split=own.split,
        corruptions=own.corruptions,
        leave_out=tuple(own.leave_out),
        forward_passes=own.forward_passes,
    )
    print_table(run_compare(configs.pool, methods, own.folder, shared.in_order, own.lambdas, choices=choices))


def compare_parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Returns the parser of the options of ``compare`` alone, and that of the whole command line, whose help is shown."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument(
        "--folder", type=Path, default=Path("runs/comparison"), help="finished fits in it are not repeated"
    )
    options.add_argument(
        "--lambdas",
        type=float,
        nargs="+",
        metavar="NUMBER",
        help="coefficients of task arithmetic that the oracle chooses from on the test labels, besides 0.3; by default 0, "
        "0.05 ... 1, each a pass over all test data",
    )
    options.add_argument(
        "--config", "-c", action="append", default=[], metavar="FILE", help="a further configuration of every fit"
    )
    options.add_argument(
        "--seeds",
        type=_numbers,
        default=[],
        metavar="N,N,...",
        help="fit each method with each of these seeds, of all that it draws; the table has means and their spread",
    )
    options.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="[METHOD:]KEY=VALUE,...",
        help="a row for each value of a key, of all methods or one; several cross each other; one value is a setting",
    )
    options.add_argument(
        "--split",
        choices=["test", "validation"],
        default="test",
        help="whose labels score; settings are chosen on validation, and reported on test, which is the default",
    )
    options.add_argument(
        "--forward-passes",
        type=int,
        metavar="N",
        help="give every search as many steps as take N samples through the merged model, instead of its own number",
    )
    options.add_argument(
        "--corruptions", action="store_true", help="score on pictures with noise, blur, less contrast and JPEG too"
    )
    options.add_argument(
        "--leave-out",
        action="append",
        default=[],
        metavar="TASK",
        help="fit without this task's expert and data, and score on it all the same; may be given again",
    )
    parser = argparse.ArgumentParser(
        prog="adamerge compare",
        usage="adamerge compare POOL METHOD_OR_RUN [METHOD_OR_RUN ...] [options] [--key=value ...]",
        description=inspect.cleandoc(compare.__doc__ or ""),
        epilog="Further --key=value go to every fit, --2.key=value to the second stage of methods that have one.",
        parents=[options],
    )
    parser.add_argument("pool", type=Path, help="what is merged: configs/pools/*.yaml")
    parser.add_argument(
        "methods",
        type=Path,
        nargs="+",
        metavar="METHOD_OR_RUN",
        help="how: configs/methods/*.yaml, or folders of stages; the folder of a finished run is scored as it is",
    )
    return options, parser


def _numbers(text: str) -> list[int]:
    """Returns whole numbers between commas, none twice."""
    return list(dict.fromkeys(int(part) for part in text.split(",")))
