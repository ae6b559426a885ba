"""Runs the numerical tests as if on other processors: ``make test-numerics``.

The kernels that torch, oneDNN, MKL and OpenBLAS choose depend on the instruction sets there are and on the number of threads,
and so does the order of their sums. Environment variables make each library choose as an older processor would.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
NUMERICAL = (
    "backbones", "deltas", "objectives", "parametrizations", "solvers", "transforms", "checkpoints/test_lora.py",
    "merging/test_block_copy.py", "merging/test_block_execution.py", "merging/test_merged_model.py",
    "merging/test_merged_tensor.py", "merging/test_pullback.py", "task_vectors/test_start.py", "task_vectors/test_storage.py",
    "training/test_batchnorm.py", "training/test_bilevel.py", "training/test_descent.py", "training/test_evaluation.py",
    "training/test_fit_checks.py", "training/test_held_coefficients.py", "training/test_learning_rate.py",
    "training/test_module.py", "training/test_nonfinite_guard.py", "training/test_objective_gradient.py",
    "training/test_schedules.py", "training/test_search.py", "training/test_step_batches.py", "training/test_task_balance.py",
    "training/test_teacher_cache.py", "training/test_teacher_files.py", "training/test_teachers_ahead.py",
    "test_adamerging.py", "test_atlas.py", "test_contracts.py", "test_expert_merging.py", "test_from_start.py",
    "test_known_answer.py", "test_precision.py",
)  # fmt: skip
NONE = {"ATEN_CPU_CAPABILITY": "default", "DNNL_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "DNNL_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
AVX512 = {"ATEN_CPU_CAPABILITY": "avx512", "DNNL_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"}
SETTINGS = {
    "as found, 2 threads": {"OMP_NUM_THREADS": "2"},
    "as found, 4 threads": {"OMP_NUM_THREADS": "4"},
    "no vector kernels": {**NONE, "OPENBLAS_CORETYPE": "Nehalem"},
    "AVX2": {**AVX2, "OPENBLAS_CORETYPE": "Haswell"},
    "AVX-512": {**AVX512, "OPENBLAS_CORETYPE": "SkylakeX"},
}
"""What the libraries are told, by name; ``make test`` itself is the processor as found with one thread."""


def main() -> int:
    """Runs the files under every setting that this processor can imitate, and prints a line each; 1 if one failed."""
    failed = False
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
    for name, variables in SETTINGS.items():
        if name == "AVX-512" and "avx512f" not in flags:
            print(f"{name}: not on this processor", flush=True)
            continue
        start = time.monotonic()
        line = [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "2",
            "--dist",
            "loadfile",
            *(f"tests/{path}" for path in NUMERICAL),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        last = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()]
        print(f"{name}: exit {done.returncode} after {time.monotonic() - start:.0f} s: {last[0]}", flush=True)
        if done.returncode:
            failed = True
            print(
                *(row for row in done.stdout.splitlines() if row.startswith(("FAILED", "ERROR"))), sep="\n", flush=True
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
