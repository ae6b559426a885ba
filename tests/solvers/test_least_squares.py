"""Layer-sequential least squares: the minimum of its sum in float64, planted answers, the order, and what it never reads."""

from __future__ import annotations

import pytest
import torch
from rounding import allowed_each
from safetensors.torch import load_file
from toy_points import TASKS, ToyPoints
from toy_residual import INNER, INPUTS, ORDER, WIDTH, ToyResidual, entering, vectors, weights

from adamerge.artifacts.recipe import describe
from adamerge.errors import ConfigError
from adamerge.solvers import LeastSquares, Scaled, WeightedSum, Wudi
from adamerge.solvers.solving import write_task_vectors
from adamerge.task_vectors.task_vectors import TaskVectors
from adamerge.training.solver_inputs import SampledInputs

MAPS = [
    ("first.weight", "first.bias"),
    ("up.weight", "up.bias"),
    ("gate.weight", None),
    ("down.weight", "down.bias"),
    ("last", None),
]
ROWS = 30
ROUNDINGS = len(TASKS) * ROWS + 2 * (INPUTS + 3 * WIDTH + INNER) + 8
"""Of the sums over the rows, and of a network's sums there for expert and merge, with the few that follow from them."""


def served(data, backbone):
    data.serve(backbone)
    return data


def solve(target, solver, pool=None, data=None, **more):
    pool, backbone = vectors() if pool is None else pool, ToyResidual()
    data = served(ToyPoints(rows=40) if data is None else data, backbone)
    inputs = SampledInputs(backbone, pool, data, samples=solver.samples, device=torch.device("cpu"))
    write_task_vectors(target, solver, pool, recipe=describe(solver), inputs=inputs, **more)
    return load_file(target)


def points_of(inputs):
    """The samples that were drawn of each task, in float64."""
    return {task: torch.cat(batches).double() for task, batches in inputs._batches.items()}


def drawn(samples):
    backbone = ToyResidual()
    data = served(ToyPoints(rows=40), backbone)
    return points_of(SampledInputs(backbone, vectors(), data, samples=samples, device=torch.device("cpu")))


def minimum(points, ridge, drift, scale, disturb):
    """What minimises the formula, map by map, as a least-squares problem of stacked rows; in float64."""
    base, experts = weights()
    base = {name: disturb(value.double()) for name, value in base.items()}
    experts = {task: {name: disturb(value.double()) for name, value in own.items()} for task, own in experts.items()}
    merged = {name: base[name] + scale * sum(own[name] - base[name] for own in experts.values()) for name in base}
    for weight, bias in MAPS:
        turned = weight == "last"

        def matrix(model, weight=weight, bias=bias, turned=turned):
            own = model[weight].T if turned else model[weight]
            return own if bias is None else torch.cat([own, model[bias][:, None]], dim=1)

        rows, targets = [], []
        for task, own in experts.items():
            (theirs, stream_there), (ours, stream_here) = (
                entering(own, points[task])[weight],
                entering(merged, points[task])[weight],
            )
            if bias is not None:
                theirs, ours = (torch.cat([x, torch.ones_like(x[:, :1])], dim=1) for x in (theirs, ours))
            target = theirs @ matrix(own).T
            rows.append(ours)
            targets.append(target if stream_there is None else target + drift * (stream_there - stream_here))
        x, start = torch.cat(rows), matrix(merged)
        squares = x.square().sum(dim=0)
        mean = squares[: None if bias is None else -1].mean()
        pull = torch.full_like(squares, float(mean))
        if bias is not None:
            pull[-1] = squares[-1]
        pulled = (ridge * pull).sqrt().diag()
        system, wanted = torch.cat([x, pulled]), torch.cat([torch.cat(targets), pulled @ start.T])
        found = torch.linalg.lstsq(system, wanted).solution.T
        solved = found if bias is None else found[:, :-1]
        merged[weight] = solved.T if turned else solved
        if bias is not None:
            merged[bias] = found[:, -1]
    return {name: merged[name] - base[name] for name in base}


@pytest.mark.parametrize(("ridge", "drift"), [(0.1, 1.0), (1.0, 0.0), (0.02, 0.25)])
def test_the_formulas_minimum_map_by_map(ridge, drift, tmp_path):
    points = drawn(ROWS)
    assert {task: len(own) for task, own in points.items()} == dict.fromkeys(TASKS, ROWS)
    written = solve(tmp_path / "m", LeastSquares(WeightedSum(0.4), ridge, drift, samples=ROWS))
    bounds = allowed_each(lambda disturb: minimum(points, ridge, drift, 0.4, disturb), ROUNDINGS)
    assert written.keys() == bounds.keys()
    for name, (exact, bound) in bounds.items():
        assert (written[name].double() - exact).abs().max() <= bound, name
    other = minimum(points, ridge, 1.0 - drift, 0.4, lambda value: value)
    assert (other["down.weight"] - bounds["down.weight"][0]).abs().max() > 100 * bounds["down.weight"][1]
