"""The contract of a solver that sees inputs: what it is handed, in which order, and that it gets on with any maps."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from toy_points import TASKS
from toy_residual import INNER, WIDTH, vectors, weights

from adamerge.backbones.capture import Entered
from adamerge.backbones.linears import LinearMap
from adamerge.errors import ConfigError
from adamerge.solvers import SequentialSolver, WeightedSum, Wudi
from adamerge.solvers.sequential import Linears
from adamerge.solvers.solving import maps_solved, write_task_vectors

GROUPS = [
    (LinearMap("first.weight", "first.bias"),),
    (LinearMap("up.weight", "up.bias"), LinearMap("gate.weight")),
    (LinearMap("down.weight", "down.bias", streams=True),),
    (LinearMap("last", None, transposed=True),),
]


class Given:
    """Inputs that are made up: ones, and twos behind a stream."""

    tasks = TASKS

    def __init__(self, groups=GROUPS):
        self.groups, self.asked = groups, []

    def begin(self, written):
        self.written = written

    def of_expert(self, group, task):
        self.asked.append(("expert", task, [one.weight for one in group]))
        yield self.entered(group)

    def of_merge(self, group, task):
        self.asked.append(("merge", task, [one.weight for one in group]))
        yield self.entered(group)

    def entered(self, group):
        streams = {one.weight: torch.full((2, WIDTH), 2.0) for one in group if one.streams}
        return Entered(torch.ones(2, INNER if group[0].weight == "down.weight" else WIDTH), streams)


class Noting(SequentialSolver):
    """Halves what the other solver makes, and notes what it could see."""

    def __init__(self, toward, samples=200):
        super().__init__(toward, samples)
        self.seen = []

    def solve_maps(self, maps, toward):
        there = {name: maps.inputs.written(name) is not None for name in maps.vectors}
        self.seen.append((maps.names, {name for name, written in there.items() if written}, toward))
        return toward / 2


def test_maps_come_in_order_and_each_after_what_was_solved(tmp_path):
    solver, given, pool = Noting(WeightedSum(0.4)), Given(), vectors()
    write_task_vectors(tmp_path / "m", solver, pool, recipe={}, inputs=given)
    order = [
        ["first.weight", "first.bias"],
        ["up.weight", "up.bias"],
        ["gate.weight"],
        ["down.weight", "down.bias"],
        ["last"],
    ]
    assert [names for names, _, _ in solver.seen] == order
    before = {"norm"}
    for names, written, _ in solver.seen:
        assert written == before, "what has been solved is there, and nothing else"
        before |= set(names)
    written = load_file(tmp_path / "m")
    for name, value in written.items():
        made = WeightedSum(0.4).solve(name, pool)
        assert torch.equal(value, made if name == "norm" else made / 2), name


def test_matrices_have_biases_as_a_column_and_stored_ones_turned():
    base, _ = weights()
    pool = vectors()
    group = (LinearMap("up.weight", "up.bias"), LinearMap("first.weight", "first.bias"))
    both = Linears(group, pool, Given())
    expected = [
        torch.cat([base[f"{one}.weight"][:, :4], base[f"{one}.bias"][:, None]], dim=1) for one in ("up", "first")
    ]
    cut = both.matrix(lambda name: base[name][:, :4] if name == "up.weight" else base[name])
    assert torch.equal(cut, torch.cat(expected))
    turned = Linears(GROUPS[3], pool, Given())
    assert torch.equal(turned.base(), base["last"].T)
    assert torch.equal(turned.tensors(turned.base())["last"], base["last"])
    down = Linears(GROUPS[2], pool, Given())
    back = down.tensors(down.expert("one"))
    assert all(torch.equal(back[name], weights()[1]["one"][name]) for name in ("down.weight", "down.bias"))


def test_inputs_have_a_one_where_there_is_a_bias_and_streams_stand_side_by_side():
    down, last = Linears(GROUPS[2], vectors(), Given()), Linears(GROUPS[3], vectors(), Given())
    ((inputs, stream),) = down.of_merge("one")
    assert inputs.shape == (2, INNER + 1) and stream is not None and torch.equal(stream, torch.full((2, WIDTH), 2.0))
    ((inputs, stream),) = last.of_expert("one")
    assert inputs.shape == (2, WIDTH) and stream is None
    some = (LinearMap("up.weight", "up.bias"), LinearMap("down.weight", "down.bias", streams=True))
    ((_, stream),) = Linears(some, vectors(), Given()).of_merge("one")
    assert stream is not None and stream.shape == (2, INNER + WIDTH)
    assert torch.equal(stream, torch.cat([torch.zeros(2, INNER), torch.full((2, WIDTH), 2.0)], dim=1))


def test_maps_that_are_not_merged_are_passed_over_and_so_are_their_biases(tmp_path):
    solver, given = Noting(WeightedSum(0.4)), Given()
    pool = vectors(exclude=["up.weight", "first.bias"])
    write_task_vectors(tmp_path / "m", solver, pool, recipe={}, inputs=given)
    assert [names for names, _, _ in solver.seen][:2] == [["first.weight"], ["gate.weight"]]
    assert load_file(tmp_path / "m").keys() == set(pool) and "up.bias" in pool


def test_autocast_changes_nothing():
    maps = Linears(GROUPS[0], vectors(), Given())
    maps.inputs.begin(lambda name: None)
    plain = maps_solved(Noting(Wudi()), maps)
    with torch.autocast("cpu", torch.bfloat16):
        again = maps_solved(Noting(Wudi()), maps)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize(("solver", "inputs"), [(Noting(Wudi()), None), (Wudi(), Given())])
def test_inputs_are_for_those_that_see_them(solver, inputs, tmp_path):
    with pytest.raises(ConfigError, match=f"{type(solver).__name__} (needs|takes no) inputs"):
        write_task_vectors(tmp_path / "m", solver, vectors(), recipe={}, inputs=inputs)
    assert not list(tmp_path.iterdir())
