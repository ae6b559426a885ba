"""Run sums: all runs of one length at once, with the bits of each by itself, and sums as exact as those of short ones."""

import pytest
import torch
from rounding import gamma

from adamerge.deltas.base import DenseDeltas
from adamerge.deltas.groups import Chunks
from adamerge.deltas.kernels import sum_rows
from adamerge.deltas.run_sums import Runs, RunSums
from adamerge.deltas.tuning import BAG, FEW, FEWEST, RUN


def by_itself(rows, coefficients, run):
    """Each run summed as a tensor of its own."""
    parts = rows.split(run, dim=1)
    return torch.cat([sum_rows(part, own) for part, own in zip(parts, coefficients.unbind(dim=1), strict=True)])


@pytest.mark.parametrize("alike", ["_bags_add_one_by_one", "_adds_one_by_one", "neither"])
@pytest.mark.parametrize("run", [1, 5, FEWEST, BAG, 3 * FEWEST + 1])
@pytest.mark.parametrize("experts", [1, 3, FEW, 9])
@pytest.mark.parametrize("narrow", [False, True])
def test_runs_have_the_bits_of_each_by_itself(monkeypatch, experts, run, alike, narrow):
    """Whichever library adds, rows of whatever dtype; also from where rows begin in the middle of larger ones."""
    for asked in ("_bags_add_one_by_one", "_adds_one_by_one"):
        if asked != alike:
            monkeypatch.setattr(f"adamerge.deltas.cpu_sums.{asked}", lambda: False)
    rows, coefficients = torch.randn(experts, 6 * run + 7)[:, 3 : 3 + 6 * run], torch.randn(experts, 6)
    rows = rows.bfloat16() if narrow else rows
    shared, wanted = RunSums([Runs(slice(0, 6 * run), 0, 6)]), by_itself(rows, coefficients, run)
    assert torch.equal(shared.sum(rows, coefficients), wanted)
    out = wanted.clone()
    shared.accumulate(out, rows, coefficients)
    for part, row in ((slice(0, run), out[:run]), (slice(5 * run, 6 * run), out[5 * run :])):
        again = wanted[part].clone()
        for own, coefficient in zip(rows[:, part], coefficients[:, 0 if part.start == 0 else 5], strict=True):
            again.addcmul_(own, coefficient.view(1))
        assert torch.equal(row, again)


@pytest.mark.parametrize("experts", [1, 2, 9])
@pytest.mark.parametrize("run", [RUN - 3, 2 * RUN, 5 * RUN + 77])
def test_sums_of_long_runs_are_as_exact_as_those_of_short_ones(experts, run):
    torch.manual_seed(0)
    values, slope = 1 + 0.1 * torch.rand(experts, 4 * run), 1 + 0.1 * torch.rand(4 * run)
    found = DenseDeltas(values).contract(slope, Chunks(4))
    exact = (values.double() * slope.double()).view(experts, 4, run).sum(dim=2)
    assert ((found - exact).abs() / exact).max() < gamma(RUN)


@pytest.mark.parametrize("experts", [1, 2, 9])
def test_no_sum_in_fp32_goes_on_from_one_stretch_of_a_run_to_the_next(experts):
    """Ones between large numbers that cancel: a sum in fp32 that holds the large ones has no digits for a one."""
    stretches = torch.tensor([2.0**20, 1.0, -(2.0**20)]).repeat_interleave(RUN)
    found = DenseDeltas(stretches.repeat(experts, 4)).contract(torch.ones(4 * 3 * RUN), Chunks(4))
    assert torch.equal(found, torch.full((experts, 4), float(RUN)))


def test_a_part_cuts_its_first_and_its_last_run():
    shared = Chunks(4).within(slice(3, 33), 40, torch.device("cpu"))
    assert shared.runs == [Runs(slice(0, 7), 0, 1), Runs(slice(7, 27), 1, 2), Runs(slice(27, 30), 3, 1)]
    assert shared.touched == slice(0, 4)
    assert Chunks(4).within(slice(12, 19), 40, torch.device("cpu")).runs == [Runs(slice(0, 7), 1, 1)]
    assert Chunks(4).within(slice(12, 20), 40, torch.device("cpu")).runs == [Runs(slice(0, 8), 1, 1)]
    assert Chunks(4).within(slice(10, 30), 40, torch.device("cpu")).runs == [Runs(slice(0, 20), 1, 2)]
