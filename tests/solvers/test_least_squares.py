"""Layer-sequential least squares: the minimum of its sum in float64, planted answers, the order, and what it never reads."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from rounding import allowed_each
from safetensors import safe_open
from safetensors.torch import load_file
from toy_points import TASKS, ToyPoints
from toy_residual import INNER, INPUTS, ORDER, WIDTH, ToyResidual, entering, vectors, weights

from adamerge.artifacts.recipe import describe
from adamerge.errors import ConfigError
from adamerge.io.resumable_file import ResumableFile
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


class Subspaces(ToyPoints):
    """Points of each task in two directions of the four, others than the other task's."""

    def load(self, task):
        generator = torch.Generator().manual_seed(1)
        points = torch.randn(self.rows_each, INPUTS, generator=generator)
        points[:, subspace(TASKS[1 - TASKS.index(task)])] = 0
        return {"calibration": datasets.Dataset.from_dict({"point": points.tolist(), "label": [0] * self.rows_each})}


def subspace(task):
    return slice(0, 2) if task == TASKS[0] else slice(2, 4)


def test_experts_that_are_one_network_on_their_own_inputs_give_it_back(tmp_path):
    """Elsewhere each is wrong in its own way, where its inputs do not go; all else they have in common."""
    base, moved = weights(("one",))
    truth = moved["one"]
    experts = {task: {name: value.clone() for name, value in truth.items()} for task in TASKS}
    for task, other in zip(TASKS, TASKS[::-1], strict=True):
        experts[task]["first.weight"][:, subspace(other)] += torch.randn(WIDTH, 2, generator=torch.Generator())
    written = solve(
        tmp_path / "m", LeastSquares(WeightedSum(None), 1e-6), TaskVectors(base, experts), Subspaces(rows=40)
    )
    averages = {name: sum(own[name] for own in experts.values()) / 2 for name in base}
    off = {name: (base[name] + value - truth[name]).abs().max() for name, value in written.items()}
    start = (averages["first.weight"] - truth["first.weight"]).abs().max()
    assert start > 0.5 and max(off.values()) < 1e-4 * start


def test_what_is_no_map_is_the_other_solvers_and_maps_follow_in_the_networks_order(tmp_path):
    written, pool, wudi = solve(tmp_path / "m", LeastSquares()), vectors(), Wudi(0.3, 0.4)
    assert torch.equal(written["norm"], wudi.solve("norm", pool))
    with safe_open(tmp_path / "m", "pt") as file:
        assert sorted(file.keys(), key=file.offset_keys().index) == ["norm", *ORDER]
        metadata = json.loads(file.metadata()["adamerge"])
    assert metadata["solver"]["init_args"]["toward"] == describe(wudi)
    assert metadata["solver"]["init_args"] | {"toward": None} == {
        "toward": None,
        "ridge": 0.1,
        "drift": 1.0,
        "samples": 200,
    }


def test_a_large_ridge_is_the_other_solver(tmp_path):
    written, pool = solve(tmp_path / "m", LeastSquares(Wudi(0.5, 0.4), ridge=1e12)), vectors()
    for name, value in written.items():
        assert (value - Wudi(0.5, 0.4).solve(name, pool)).abs().max() <= 1e-6, name


@pytest.mark.parametrize("before", [0, 1, 2, 4, 7, 8])
def test_a_killed_solve_goes_on_to_the_same_bytes(before, tmp_path, monkeypatch):
    solve(tmp_path / "whole", LeastSquares())
    add, count = ResumableFile.add, []

    def dying(self, tensor):
        if len(count) == before:
            raise KeyboardInterrupt
        count.append(tensor)
        add(self, tensor)

    monkeypatch.setattr(ResumableFile, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        solve(tmp_path / "cut", LeastSquares())
    monkeypatch.setattr(ResumableFile, "add", add)
    left = []
    solve(tmp_path / "cut", LeastSquares(), shown=lambda names: left.extend(names) or iter(names))
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()
    # what a kill left of maps that share their inputs is solved again, by its last tensor's name
    lasts = ["norm", "first.bias", "up.bias", "gate.weight", "down.bias", "last"]
    done = ["norm", *ORDER][:before]
    assert left == [name for name in lasts if name not in done]


def test_two_solves_in_a_process_and_other_labels_give_the_same_bytes(tmp_path):
    solve(tmp_path / "one", LeastSquares())
    solve(tmp_path / "other", LeastSquares(ridge=3.0))
    solve(tmp_path / "again", LeastSquares())
    solve(tmp_path / "wrong", LeastSquares(), data=ToyPoints(rows=40, wrong_labels=True))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "again").read_bytes()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "wrong").read_bytes()
    assert (tmp_path / "one").read_bytes() != (tmp_path / "other").read_bytes()


@pytest.mark.parametrize("change", [{"seed": 1}, {"eval_batch_size": 7}])
def test_other_samples_and_batches(change, tmp_path):
    """A seed draws other samples; batches change roundings alone."""
    plain = solve(tmp_path / "one", LeastSquares(samples=20))
    other = solve(tmp_path / "other", LeastSquares(samples=20), data=ToyPoints(rows=40, **change))
    most = max(float((plain[name] - other[name]).abs().max()) for name in plain)
    assert most > 1e-2 if "seed" in change else most < 1e-5


def test_inputs_that_are_all_zero_leave_the_other_solvers(tmp_path):
    class Zeros(ToyPoints):
        def load(self, task):
            rows = datasets.Dataset.from_dict(
                {"point": [[0.0] * INPUTS] * self.rows_each, "label": [0] * self.rows_each}
            )
            return {"calibration": rows}

    base, experts = weights()
    for model in (base, *experts.values()):
        model["first.bias"] = torch.zeros(WIDTH)
    pool = TaskVectors(base, experts)
    written = solve(tmp_path / "m", LeastSquares(WeightedSum(0.4)), pool, Zeros(rows=40))
    assert torch.equal(written["first.weight"], WeightedSum(0.4).solve("", {"": pool["first.weight"]}))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LeastSquares(ridge=0.0), "ridge must be positive"),
        (lambda: LeastSquares(drift=float("nan")), "drift must be a finite number"),
        (lambda: LeastSquares(samples=0), "samples must be at least 1"),
        (lambda: LeastSquares(LeastSquares()), "LeastSquares sees inputs, and cannot stand inside"),
        (lambda: Scaled(LeastSquares(), 0.5), "LeastSquares sees inputs, and cannot stand inside"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
