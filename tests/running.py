"""What the tests of runs share: a pool's YAML in a temporary folder, the command line in this process, and children."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file

from adamerge.cli import main

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "configs" / "methods"
LAYER_WISE = METHODS / "adamerging_layer_wise.yaml"
TASK_ARITHMETIC = METHODS / "task_arithmetic.yaml"
QUICK = ("--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0", "--data.batch_size=4")


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The line that says what was wrong."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, f"one error line expected:\n{self.err[-3000:]}"
        return lines[0]


def pool_config(pool: Mapping[str, Any], images: Mapping[str, str]) -> dict[str, Any]:
    """The tiny pool as a person would write it."""
    tasks = {task: {"dataset": folder, "templates": ["a photo of {}"]} for task, folder in images.items()}
    return {
        "model": {
            "backbone": {
                "class_path": "adamerge.backbones.OpenClipClassifier",
                "init_args": {"architecture": pool["base"]},
            },
            "task_vectors": copy.deepcopy(dict(pool)),
        },
        "data": {"class_path": "adamerge.data.ImageCalibration", "init_args": {"tasks": tasks}},
    }


def write_yaml(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the heat map empty: drawing takes half the time of a short fit."""
    for module in ("adamerge.training.callbacks", "adamerge.runs.fit"):
        monkeypatch.setattr(f"{module}.draw_heatmap", lambda table, path, *title, **more: path.write_bytes(b""))


def import_anew(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Let a module be imported from where this test writes it, and no other test meet it."""
    monkeypatch.setitem(sys.modules, module, None)  # what was there, or that nothing was, is what comes back
    del sys.modules[module]


def command(capfd: pytest.CaptureFixture[str], *words: object) -> Outcome:
    """``adamerge WORDS`` in this process."""
    capfd.readouterr()
    try:
        code = main([str(word) for word in words])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    return Outcome(code, *capfd.readouterr())


def fit_words(pool_file: Path, *words: object, method: Path = LAYER_WISE, steps: int = 3) -> list[str]:
    configs = ["--config", str(pool_file), "--config", str(method)]
    return [*configs, *QUICK, f"--trainer.max_steps={steps}", *map(str, words)]


def environment(**changes: str | None) -> dict[str, str]:
    """For children: no server, one thread each time; None takes a variable away."""
    fixed = {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return {key: value for key, value in {**os.environ, **fixed, **changes}.items() if value is not None}


def child(
    words: Sequence[object], cwd: Path, timeout: float = 120, **changes: str | None
) -> subprocess.CompletedProcess[str]:
    """``python WORDS`` in a process of its own."""
    line = [sys.executable, *map(str, words)]
    return subprocess.run(
        line, cwd=cwd, env=environment(**changes), capture_output=True, text=True, timeout=timeout, check=False
    )


def numbers_of(script: str, *words: object) -> tuple[int, ...]:
    """What a script prints that measures memory, in a process of its own.

    Its C library gives back what is freed, or what it happens to keep would decide: up to 250 MiB between equal runs.
    """
    line = ["-c", textwrap.dedent(script), *words]
    run = child(line, ROOT, timeout=900, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_ARENA_MAX="1")
    assert run.returncode == 0, run.stderr
    return tuple(map(int, run.stdout.split()))


def coefficients(run: Path) -> dict[str, torch.Tensor]:
    """Raw values of a run."""
    return load_file(run / "coefficients.safetensors")


def same_coefficients(one: Path, other: Path) -> bool:
    """Whether two runs hold the same values, to the bit."""
    left, right = coefficients(one), coefficients(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def adam_state(run: Path) -> dict[str, Any]:
    """Optimiser state of the last checkpoint."""
    loaded = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return {"step": loaded["global_step"], **loaded["optimizer_states"][0]["state"][0]}
