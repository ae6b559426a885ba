"""Seconds of solvers on the matrices of a block of ViT-B/32, beside the products or decompositions of their formulas.

    python tests/benchmarks/solvers.py --experts 8 --rounds 3

Deltas are in memory. Both variants take turns on the same matrices, so that a noisy machine hits both alike; a ratio is the
median of the rounds' own. WUDI's products are ``tau^T tau`` and ``tau tau^T tau`` of each expert; the others' decompositions
are those of each expert's matrix, of their sum, and of the vectors that are made orthogonal, as each of them needs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from adamerge.deltas.base import DenseDeltas
from adamerge.solvers import TSVM, IsoC, IsoCTS, Solver, Wudi

SHAPES = {"in_proj": (2304, 768), "out_proj": (768, 768), "c_fc": (3072, 768), "c_proj": (768, 3072)}
"""Matrices of one of the twelve blocks of ViT-B/32."""
LIMITS = {"Wudi": 3.0, "TSVM": 1.3, "IsoC": 1.3, "IsoCTS": 1.3}


def svd(matrix: Tensor) -> None:
    torch.linalg.svd(matrix, full_matrices=False)


def products(taus: Tensor) -> None:
    """What WUDI multiplies, the smaller inner product first."""
    for tau in taus:
        tau.T @ tau
        if tau.shape[0] < tau.shape[1]:
            (tau @ tau.T) @ tau
        else:
            tau @ (tau.T @ tau)


def of_each_and_two(taus: Tensor) -> None:
    for tau in taus:
        svd(tau)
    rows, columns = taus.shape[1:]
    share = min(rows, columns) // len(taus)
    for length in (rows, columns):  # the left vectors of all experts side by side, and the right ones
        svd(torch.cat([torch.linalg.qr(torch.randn(length, share))[0] for _ in taus], dim=1))


def of_the_sum(taus: Tensor) -> None:
    svd(taus.sum(dim=0))


def of_all(taus: Tensor) -> None:
    of_the_sum(taus)
    of_each_and_two(taus)


PAIRS: list[tuple[Solver, Callable[[Tensor], None]]] = [
    (Wudi(), products),
    (IsoC(), of_the_sum),
    (TSVM(), of_each_and_two),
    (IsoCTS(), of_all),
]


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure(solver: Solver, alone: Callable[[Tensor], None], pool: dict[str, Tensor], rounds: int) -> dict[str, float]:
    """Median seconds of both over all matrices, and the median ratio."""

    def solve() -> None:
        for name, taus in pool.items():
            solver.solve(name, {name: DenseDeltas(taus)})

    def floor() -> None:
        for taus in pool.values():
            alone(taus)

    pairs = [(seconds(solve), seconds(floor)) for _ in range(rounds)]
    whole, own = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)
    return {"seconds": whole, "alone": own, "ratio": ratio, "limit": LIMITS[type(solver).__name__]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--matrices", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--solvers", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    pool = {name: 1e-3 * torch.randn(options.experts, *SHAPES[name]) for name in options.matrices}
    result: dict[str, object] = {
        "experts": options.experts,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
    }
    result["matrices"] = {name: SHAPES[name] for name in options.matrices}
    with torch.no_grad():
        for solver, alone in PAIRS:
            kind = type(solver).__name__
            if kind in options.solvers:
                result[kind] = measured = measure(solver, alone, pool, options.rounds)
                print(kind, {key: round(value, 3) for key, value in measured.items()}, flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
