"""Tuning constants: each is used, none stands elsewhere in the engine, and none changes a sum."""

import ast
from pathlib import Path

import pytest
import torch

from adamerge.deltas import element_sums, kernels, run_sums, tuning
from adamerge.deltas.base import DenseDeltas
from adamerge.deltas.groups import Chunks, Ids, RowsAndColumns, Whole

PACKAGE = Path(tuning.__file__).parents[1]
NAMES = [name for name in vars(tuning) if name.isupper()]
ROOMS = ("deltas", "parametrizations", "task_vectors", "artifacts")
SOURCES = [path for room in ROOMS for path in (PACKAGE / room).glob("*.py")]


@pytest.mark.parametrize("name", NAMES)
def test_each_is_used(name):
    assert any(name in path.read_text() for path in SOURCES if path.name != "tuning.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_none_stands_elsewhere(path):
    """A power of two at the top of a file is one."""
    for node in ast.parse(path.read_text()).body:
        if path.name != "tuning.py" and isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp):
            assert not isinstance(node.value.op, ast.LShift), f"line {node.lineno}"


@pytest.mark.parametrize("run", [16, 1 << 10])
@pytest.mark.parametrize(
    "groups",
    [Whole(), Chunks(3), Chunks(4), Ids(3, lambda: torch.arange(5000) % 3), RowsAndColumns(50, 100)],
    ids=["one", "uneven", "even", "ids", "rows and columns"],
)
def test_a_contraction_has_the_same_sums_whatever_the_runs(monkeypatch, groups, run):
    deltas, slope = DenseDeltas(torch.randint(-8, 8, (3, 5000)).float()), torch.randint(-8, 8, (5000,)).float()
    wanted = deltas.contract(slope, groups)  # of whole numbers, which no order rounds
    for name in ("RUN", "LONG_RUN", "SEGMENT"):
        monkeypatch.setattr(kernels, name, run)
    monkeypatch.setattr(run_sums, "RUN", run)
    monkeypatch.setattr(element_sums, "TILE", run)
    assert torch.equal(deltas.contract(slope, groups), wanted)
