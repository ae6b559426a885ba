"""The command line: what a verb needs is imported when it is called, so that ``adamerge --help`` is quick."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from adamerge.errors import AdamergeError, did_you_mean
from adamerge.merging.malloc import keep_freed_memory
from adamerge.runs.command_line import told_apart
from adamerge.runs.verbs import check, compare, fit, import_from_here

HELP = """adamerge: learn how to merge models

usage: adamerge VERB [arguments]      adamerge VERB --help

  fit      learn merging coefficients     POOL METHOD [--model.search.lr=... --trainer.max_steps=...]
           or go on with a run            --resume RUN
  test     score on labelled data         RUN_OR_FILE [--config POOL]
  export   write the merged model         RUN_OR_FILE FOLDER
  check    what fits, and in what memory  POOL METHOD [--model.storage=...]
  inspect  show what a file or run holds  FILE_OR_FOLDER
  compare  several methods, one table     POOL METHOD [METHOD ...]

A POOL says what is merged and on which data (configs/pools), a METHOD how (configs/methods); they may come in either
order, with or without --config. A METHOD that is a folder has stages, 1_*.yaml, 2_*.yaml; --2.KEY=VALUE is for the
second alone. A run is a folder, runs/<name>/<id>, with its coefficients, metrics, heat map and summary.

exit codes: 0 done, 2 configuration, 3 model or data, 4 diverged or collapsed, 5 export, 130 and 143 interrupted
--debug anywhere shows the full trace of an error.
"""


def test(arguments: list[str]) -> None:
    """Scores a run, or a coefficient file, on the labelled test or validation split of its data or of a named pool."""
    parser = argparse.ArgumentParser(
        prog="adamerge test",
        usage="adamerge test RUN [POOL] [--split SPLIT] [--allow-plugins PREFIX] [--key=value ...]",
        description=test.__doc__,
        epilog="RUN is the folder of a run, or its coefficients.safetensors; POOL one whose data are scored instead of the "
        "run's. They may come in either order, POOL with or without --config. Further --key=value are those of fit.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--allow-plugins", action="append", default=[], metavar="PREFIX", help="modules the recipe may name"
    )
    parser.add_argument("--split", choices=["test", "validation"], default="test", help="whose labels; test by default")
    own, rest = parser.parse_known_args(arguments)
    words = told_apart(rest)
    runs = [file for file in words.files if Path(file).suffix not in {".yaml", ".yml"}]
    pools = [Path(file) for file in words.files if file not in runs]
    if len(runs) != 1 or words.flags:
        parser.error(f"which run? It takes one run and pools, not {words.files}")
    import_from_here()
    keep_freed_memory()
    from adamerge.runs.scoring import print_scores, score_run

    print_scores(*score_run(Path(runs[0]), own.split, pools, own.allow_plugins, words.overrides))


def export(arguments: list[str]) -> None:
    """Writes the merged model to a folder that open_clip or transformers loads, without data and training libraries."""
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
        metavar="{float32,bfloat16,float16}",
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
    parser.add_argument("--start", metavar="PATH", help="where the deltas are now that the coefficients begin from")
    parser.add_argument("--components", metavar="PATH", help="where the file of the experts' components is now")
    parser.add_argument(
        "--allow-plugins", action="append", default=[], metavar="PREFIX", help="modules the recipe may name"
    )
    parser.add_argument("--allow-other-models", action="store_true", help="apply to models with other fingerprints")
    own = parser.parse_args(arguments)
    if own.allow_plugins:
        import_from_here()
    from adamerge.artifacts.export import export_from

    folder = export_from(
        own.coefficients,
        own.target,
        adapter=own.adapter,
        dtype=own.dtype,
        shard_size=own.shard_size,
        task=own.task,
        overwrite=own.overwrite,
        base=own.base,
        experts=dict(item.partition("=")[::2] for item in own.expert),
        start=own.start,
        components=own.components,
        plugins=own.allow_plugins,
        verify=not own.allow_other_models,
    )
    print(f"exported: {folder}")


def inspect(arguments: list[str]) -> None:
    """Shows what a coefficient file, a run's folder or a model holds, without reading weights."""
    parser = argparse.ArgumentParser(prog="adamerge inspect", description=inspect.__doc__)
    parser.add_argument("path", help="coefficients.safetensors, a run's folder, or a model")
    own = parser.parse_args(arguments)
    from adamerge.runs.inspection import describe_path

    describe_path(own.path)


VERBS: dict[str, Callable[[list[str]], None]] = {
    "fit": fit,
    "check": check,
    "test": test,
    "export": export,
    "inspect": inspect,
    "compare": compare,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a verb and returns the exit code; an expected failure is printed as one readable error.

    Args:
        arguments: the words after ``adamerge``; those of this process when None.

    Returns:
        0 when done, otherwise the code that ``adamerge --help`` lists for the failure.

    Raises:
        AdamergeError: an expected failure, under ``--debug`` alone, so that its trace is shown.
        SystemExit: help was printed, or the words of the verb were refused.
    """
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
            print("terminated", file=sys.stderr)
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
        what = f"there is no verb '{words[0]}'{did_you_mean(words[0], VERBS)}"
        print(f"error: {what}\n  expected one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    VERBS[words[0]](words[1:])
    return 0
