"""The command line: what a verb needs is imported when it is called, so that ``adamerge --help`` is quick."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from adamerge.errors import AdamergeError
from adamerge.heap import keep_freed_memory

HELP = """adamerge: learn how to merge models

usage: adamerge VERB [arguments]      adamerge VERB --help

  fit      learn merging coefficients     --config POOL --config METHOD [--model.lr=... --trainer.max_steps=...]
           or go on with a run            --resume RUN
  test     score on labelled data         RUN_OR_FILE [--config POOL]
  export   write the merged model         RUN_OR_FILE FOLDER
  check    what fits, and in what memory  POOL METHOD [--model.storage=...]
  inspect  show what a file or run holds  FILE_OR_FOLDER
  compare  several methods, one table     POOL METHOD [METHOD ...]

A POOL says what is merged and on which data (configs/pools), a METHOD how (configs/methods); they may come in either
order. A METHOD that is a folder has stages, 1_*.yaml, 2_*.yaml; --2.KEY=VALUE is for the second alone. A run is
a folder, runs/<name>/<id>, with its coefficients, metrics, heat map and summary.

exit codes: 0 done, 2 configuration, 3 model or data, 4 diverged or collapsed, 5 export, 130 and 143 interrupted
--debug anywhere shows the full trace of an error.
"""


def _import_from_here() -> None:
    """Let configurations name classes of modules in the working directory, after all that is installed."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def fit(arguments: list[str]) -> None:
    """Learn coefficients, or go on with a run."""
    parser = argparse.ArgumentParser(prog="adamerge fit", add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--allow-resume-difference", action="store_true")
    own, rest = parser.parse_known_args(arguments)
    if not rest and own.resume is None:
        rest = ["--help"]
    if {"-h", "--help"} & set(rest):
        print("adamerge fit --resume RUN [--allow-resume-difference] goes on with a run from its last checkpoint.\n")
    _import_from_here()
    keep_freed_memory()
    from adamerge.stages import fit as run_fit

    folder = run_fit(rest, own.resume, own.allow_resume_difference)
    if folder is not None:
        print(f"run: {folder}\nexport it with: adamerge export {folder / 'coefficients.safetensors'} merged/")


def check(arguments: list[str]) -> None:
    """Say before a fit, from headers alone, what would fail and what it would take.

    Nothing is downloaded but LoRA adapters, no weight is read and no network built. Listed are all experts, with
    everything that keeps them from being merged with the base; the number of coefficients; the predicted peak memory
    of every storage, and which would be chosen on this machine.
    """
    parser = argparse.ArgumentParser(
        prog="adamerge check",
        description=check.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="Further --key=value are those of fit; --2.key=value is for the second stage. Exit code: 0 when nothing\n"
        "speaks against a fit, 2 for the configuration, 3 for base or experts. Too little memory is a warning: the fit\n"
        "may be meant for another machine.",
    )
    parser.add_argument("pool", type=Path, help="what is merged: configs/pools/*.yaml")
    parser.add_argument("method", type=Path, help="how: configs/methods/*.yaml, or a folder of stages")
    parser.add_argument("others", type=Path, nargs="*", help="further configurations, such as configs/tasks/*.yaml")
    parser.add_argument("--config", "-c", type=Path, action="append", default=[], help="another way to name them")
    rest, overrides = _overrides_apart(arguments)
    own = parser.parse_args(rest)
    _import_from_here()
    from adamerge.checking import check as run_check

    run_check([own.pool, own.method, *own.others, *own.config], overrides)


def _overrides_apart(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Files and ``--config``, and ``--key=value`` or ``--key value``: argparse takes such values for files."""
    rest: list[str] = []
    overrides: list[str] = []
    words = iter(arguments)
    for word in words:
        if not word.startswith("--") or word.partition("=")[0] in {"--config", "--help"}:
            rest.append(word)
        else:
            overrides += (
                [word] if "=" in word else [word, *(value for value in [next(words, None)] if value is not None)]
            )
    return rest, overrides


def test(arguments: list[str]) -> None:
    """Score a run, or a coefficient file, on the labelled test or validation split of its data or of a named pool."""
    parser = argparse.ArgumentParser(prog="adamerge test", description=test.__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, or its coefficients.safetensors")
    parser.add_argument(
        "--config",
        "-c",
        type=Path,
        action="append",
        default=[],
        help="a pool whose data are scored instead of the run's",
    )
    parser.add_argument(
        "--allow-plugins", action="append", default=[], metavar="PREFIX", help="modules the recipe may name"
    )
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    own = parser.parse_args(arguments)
    _import_from_here()
    keep_freed_memory()
    from adamerge.scoring import print_scores, score_run

    print_scores(*score_run(own.run, own.split, own.config, own.allow_plugins))


def export(arguments: list[str]) -> None:
    """Write the merged model to a folder that open_clip or transformers loads; needs no data and no training libraries."""
    parser = argparse.ArgumentParser(prog="adamerge export", description=export.__doc__)
    parser.add_argument("coefficients", type=Path, help="folder of a run, or its coefficients.safetensors")
    parser.add_argument("target", type=Path, help="the new folder")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing folder, once the new one is complete"
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="write one LoRA adapter of the base, of LoRA experts with whole-tensor coefficients",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the weights; default: as in training, where the copy is float32 unless model.backbone.dtype says other",
    )
    parser.add_argument(
        "--shard-size",
        type=float,
        metavar="GB",
        help="of one weights file at most, 5 by default; a larger model of transformers is several, with an index",
    )
    parser.add_argument(
        "--task", help="a complete model for this task, with its expert's head; default: all heads aside"
    )
    parser.add_argument("--base", help="where the base is now")
    parser.add_argument("--expert", action="append", default=[], metavar="NAME=PATH", help="where an expert is now")
    parser.add_argument(
        "--allow-plugins", action="append", default=[], metavar="PREFIX", help="modules the recipe may name"
    )
    parser.add_argument("--allow-other-models", action="store_true", help="apply to models with other fingerprints")
    own = parser.parse_args(arguments)
    import torch

    from adamerge.adapter_export import export_adapter
    from adamerge.coefficients import load_coefficients
    from adamerge.export import SHARD, size_of
    from adamerge.export import export as write

    if own.adapter and (own.dtype or own.shard_size):
        parser.error("--adapter writes fp32 factors, in one file: --dtype and --shard-size do not go with it")

    if own.allow_plugins:
        _import_from_here()
    moved = dict(item.partition("=")[::2] for item in own.expert)
    coefficients = load_coefficients(
        own.coefficients, own.base, moved, own.allow_plugins, verify=not own.allow_other_models
    )
    if own.adapter:
        print(f"exported: {export_adapter(coefficients, own.target, overwrite=own.overwrite)}")
        return
    dtype = getattr(torch, own.dtype) if own.dtype else coefficients.dtype
    numbers, nbytes = size_of(coefficients, dtype, own.task)
    print(f"{numbers / 1e6:,.1f} M numbers, {nbytes / 1e9:,.2f} GB in {str(dtype).removeprefix('torch.')}", flush=True)
    shard = SHARD if own.shard_size is None else own.shard_size
    found = write(coefficients, own.target, dtype=dtype, overwrite=own.overwrite, task=own.task, shard_size=shard)
    print(f"exported: {found}")


def inspect(arguments: list[str]) -> None:
    """Show what a coefficient file, a run's folder or a model holds, without reading weights."""
    parser = argparse.ArgumentParser(prog="adamerge inspect", description=inspect.__doc__)
    parser.add_argument("path", help="coefficients.safetensors, a run's folder, or a model")
    own = parser.parse_args(arguments)
    from adamerge.inspection import describe_path

    describe_path(own.path)


def compare(arguments: list[str]) -> None:
    """Fit several methods on one pool and print one table, beside the base, the experts and tuned task arithmetic."""
    parser = argparse.ArgumentParser(
        prog="adamerge compare", description=compare.__doc__, epilog="Further --key=value go to every fit."
    )
    parser.add_argument("pool", type=Path)
    parser.add_argument("methods", type=Path, nargs="+")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/comparison"), help="finished fits in it are not repeated"
    )
    parser.add_argument(
        "--lambdas",
        type=float,
        nargs="+",
        help="coefficients of task arithmetic that the oracle chooses from on the test labels, besides 0.3; by default 0, "
        "0.05 ... 1, each a pass over all test data",
    )
    own, overrides = parser.parse_known_args(arguments)
    _import_from_here()
    keep_freed_memory()
    from adamerge.comparison import compare as run_compare
    from adamerge.comparison import print_table

    print_table(run_compare(own.pool, own.methods, own.folder, overrides, own.lambdas))


VERBS: dict[str, Callable[[list[str]], None]] = {
    "fit": fit,
    "check": check,
    "test": test,
    "export": export,
    "inspect": inspect,
    "compare": compare,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; every expected failure is one readable error and an exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    try:
        code = _run([word for word in words if word != "--debug"])
        sys.stdout.flush()
    except AdamergeError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as error:
        # Lightning's way of saying that the process was asked to end
        if type(error).__name__ == "SIGTERMException":
            print("terminated; go on with: adamerge fit --resume RUN", file=sys.stderr)
            return 143
        raise
    return code


def _run(words: list[str]) -> int:
    if not words or words[0] in {"-h", "--help", "help"}:
        print(HELP, end="")
        return 0
    if words[0] == "--version":
        from adamerge import __version__

        print(__version__)
        return 0
    if words[0] not in VERBS:
        import difflib

        near = difflib.get_close_matches(words[0], VERBS, 1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        print(f"error: there is no verb '{words[0]}'{hint}\n  expected one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    VERBS[words[0]](words[1:])
    return 0
