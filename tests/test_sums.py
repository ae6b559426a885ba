"""Sums: the same bits wherever rows are cut, and over many elements as exact as over few."""

import pytest
import torch

from adamerge.deltas import DenseDeltas
from adamerge.groups import Chunks, Whole
from adamerge.sums import _adds_one_by_one

CPU = torch.device("cpu")


@pytest.mark.parametrize("groups", [Whole(), Chunks(3)], ids=["whole", "chunks"])
@pytest.mark.parametrize("experts", [1, 2, 9])
def test_sums_over_a_large_tensor_are_as_exact_as_over_a_small_one(groups, experts):
    """One running sum in fp32 over so many products would be off by more."""
    numel = (1 << 21) + 77
    torch.manual_seed(0)
    values, slope = 1 + 0.1 * torch.rand(experts, numel), 1 + 0.1 * torch.rand(numel)
    found = DenseDeltas(values).contract(slope, groups)
    exact = torch.zeros(experts, groups.count, dtype=torch.float64)
    for group, part in enumerate(Chunks(groups.count).within(slice(0, numel), numel, CPU).slices):
        exact[:, group] = values[:, part].double() @ slope[part].double()
    assert ((found - exact).abs() / exact).max() < 5e-7


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("experts", [1, 3, 4, 5, 11])
def test_an_elements_sum_is_the_same_bits_wherever_a_tensor_is_cut_and_rows_are(monkeypatch, alike, experts):
    """Whether or not the linear algebra library adds as if one by one: it is not used where it does not."""
    if not alike:
        monkeypatch.setattr("adamerge.sums._adds_one_by_one", lambda: False)
    rows, coefficients = torch.randn(experts, 5003), torch.randn(experts, 1)
    whole = DenseDeltas(rows).summed(coefficients, Whole())
    one_by_one = torch.mul(rows[0], coefficients[0])
    for row, coefficient in zip(rows[1:], coefficients[1:], strict=True):
        one_by_one.addcmul_(row, coefficient)
    assert torch.equal(whole, one_by_one)
    for start, stop in ((0, 1), (1, 8), (3, 4099), (4096, 5003), (5002, 5003)):
        assert torch.equal(DenseDeltas(rows).summed(coefficients, Whole(), slice(start, stop)), whole[start:stop])


def test_the_library_is_asked_on_the_cpu_whatever_the_default_device_is():
    with torch.device("meta"):
        assert isinstance(_adds_one_by_one.__wrapped__(), bool)
