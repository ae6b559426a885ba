"""Kernels: the same bits wherever rows are cut, and over many elements as exact as over few."""

import pytest
import torch

from adamerge.deltas.base import DenseDeltas
from adamerge.deltas.groups import Chunks, Whole
from adamerge.deltas.kernels import sum_rows
from adamerge.deltas.tuning import BAG, FEW, FEWEST


@pytest.mark.parametrize("groups", [Whole(), Chunks(3)], ids=["whole", "chunks"])
@pytest.mark.parametrize("experts", [1, 2, 9])
def test_sums_over_a_large_tensor_are_as_exact_as_over_a_small_one(groups, experts):
    """One running sum in fp32 over so many products would be off by more."""
    numel = (1 << 21) + 77
    torch.manual_seed(0)
    values, slope = 1 + 0.1 * torch.rand(experts, numel), 1 + 0.1 * torch.rand(numel)
    found = DenseDeltas(values).contract(slope, groups)
    exact = torch.zeros(experts, groups.count, dtype=torch.float64)
    for group in range(groups.count):
        part = slice(group * numel // groups.count, (group + 1) * numel // groups.count)
        exact[:, group] = values[:, part].double() @ slope[part].double()
    assert ((found - exact).abs() / exact).max() < 5e-7


@pytest.mark.parametrize("numel", [5003, 3 * BAG + FEWEST])
@pytest.mark.parametrize("alike", ["_bags_add_one_by_one", "_adds_one_by_one", "neither"])
@pytest.mark.parametrize("experts", [1, 3, 4, 5, 11])
def test_an_elements_sum_is_the_same_bits_wherever_a_tensor_is_cut_and_rows_are(monkeypatch, alike, experts, numel):
    """Whichever library adds as if one by one: none is used where it does not."""
    for asked in ("_bags_add_one_by_one", "_adds_one_by_one"):
        if asked != alike:
            monkeypatch.setattr(f"adamerge.deltas.cpu_sums.{asked}", lambda: False)
    rows, coefficients = torch.randn(experts, numel), torch.randn(experts, 1)
    whole = DenseDeltas(rows).summed(coefficients, Whole())
    one_by_one = torch.mul(rows[0], coefficients[0])
    for row, coefficient in zip(rows[1:], coefficients[1:], strict=True):
        one_by_one.addcmul_(row, coefficient)
    assert torch.equal(whole, one_by_one)
    for start, stop in ((0, 1), (1, 8), (3, 4099), (FEWEST, 2 * BAG), (1, 1 + BAG), (4096, numel), (5002, numel)):
        assert torch.equal(DenseDeltas(rows).summed(coefficients, Whole(), slice(start, stop)), whole[start:stop])


@pytest.mark.parametrize("experts", [FEW, 9])
def test_a_row_that_is_not_finite_stays_so(experts):
    rows = torch.randn(experts, BAG)
    rows[1, 5], rows[2, 6] = torch.inf, torch.nan
    found = sum_rows(rows, torch.ones(experts))
    assert found[5] == torch.inf and found[6].isnan() and int(found.isfinite().sum()) == BAG - 2
