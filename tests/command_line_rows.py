"""The table of command lines (``command_lines.yaml``): a pool, methods and files for its rows, and what the verbs answer."""

from __future__ import annotations

import contextlib
import io
import shlex
import shutil
from pathlib import Path
from typing import Any

import yaml
from running import pool_config, write_yaml

from adamerge.cli import main

TABLE = Path(__file__).parent / "command_lines.yaml"
DRY = "--trainer.fast_dev_run=true"
LEARNED = {"parametrization": {"class_path": "LayerWise"}, "objective": {"class_path": "Entropy"}}
PAPER = """
from adamerge import Entropy, LayerWise


class Halved(Entropy):
    def forward(self, output, batch):
        return super().forward(output, batch) / 2


class Started(LayerWise):
    def __init__(self, task_vectors, start: str) -> None:
        open(start).close()
        super().__init__(task_vectors)


class NotAPart:
    pass
"""


def rows() -> list[dict[str, Any]]:
    """The table; what its fields are stands at its top."""
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def set_out(folder: Path, pool: Any, images: Any) -> None:
    """Write the pool and the methods that the rows name, and those files of single rows that do not change."""
    write_yaml(folder / "pool.yaml", pool_config(pool, images) | {"data": _few(pool_config(pool, images)["data"])})
    write_yaml(folder / "method.yaml", {"model": LEARNED, "trainer": {"max_steps": 3, "enable_progress_bar": False}})
    for stage in ("1_first", "2_second"):
        write_yaml(folder / "staged" / f"{stage}.yaml", {"model": LEARNED, "trainer": {"max_steps": 3}})
    shutil.copy(pool["experts"]["colours"], folder / "far.safetensors")
    (folder / "mypaper.py").write_text(PAPER, encoding="utf-8")


def answers(row: dict[str, Any], folder: Path) -> dict[str, tuple[int, str]]:
    """Exit code and first line of the error of both verbs, in the working directory ``folder``."""
    for name, text in row.get("files", {}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    words = shlex.split(row["words"])
    try:
        return {verb: _answer([verb, *words, *([] if row.get("dry") is False else [DRY])]) for verb in ("fit", "check")}
    finally:
        for name in row.get("files", {}):
            (folder / name).unlink()


def _few(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "init_args": {**data["init_args"], "batch_size": 4, "calibration_samples": 8}}


def _answer(words: list[str]) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(words)
        except SystemExit as end:  # of a parser
            code = end.code if isinstance(end.code, int) else 1
    lines = [line for line in said.getvalue().splitlines() if line.startswith("error: ") or ": error: " in line]
    return code, lines[-1].rpartition("error: ")[2] if lines else ""
