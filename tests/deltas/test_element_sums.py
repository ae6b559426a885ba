"""Element sums: tiles cover a part once, sums have the same bits wherever it is cut, and long sums are exact."""

import pytest
import torch

from adamerge.deltas import element_sums
from adamerge.deltas.base import DenseDeltas
from adamerge.deltas.element_sums import ElementSums, RowColumnSums
from adamerge.deltas.groups import RowsAndColumns

CPU = torch.device("cpu")


@pytest.mark.parametrize("tile", [1, 14, 1 << 16])
def test_tiles_cover_a_part_once_and_in_order(monkeypatch, tile):
    monkeypatch.setattr(element_sums, "TILE", tile)
    places = torch.arange(35).view(5, 7)
    for start in range(35):
        for stop in range(start, 36):
            tiles = list(RowColumnSums(5, 7, slice(start, stop), CPU).tiles())
            seen = [places[own.rows, own.columns].reshape(-1) for own in tiles]
            assert torch.cat([torch.empty(0), *seen]).tolist() == list(range(start, stop))
            assert [own.elements.stop - own.elements.start for own in tiles] == [len(own) for own in seen]


@pytest.mark.parametrize("experts", [1, 3, 9])
@pytest.mark.parametrize("tile", [64, 1 << 16])
def test_an_elements_sum_is_the_same_bits_wherever_a_matrix_is_cut(monkeypatch, experts, tile):
    monkeypatch.setattr(element_sums, "TILE", tile)
    rows, columns = 23, 57
    deltas, groups = DenseDeltas(torch.randn(experts, rows, columns)), RowsAndColumns(rows, columns)
    coefficients = torch.randn(experts, groups.count)
    scales = coefficients[:, :rows].unsqueeze(2) + coefficients[:, rows:].unsqueeze(1)
    wanted = deltas.values[0] * scales[0]
    for own, scale in zip(deltas.values[1:], scales[1:], strict=True):
        wanted.addcmul_(own, scale)
    whole = deltas.summed(coefficients, groups)
    assert torch.equal(whole, wanted.view(-1))
    for start, stop in ((0, 1), (5, 60), (57, 114), (57, 115), (100, rows * columns)):
        assert torch.equal(deltas.summed(coefficients, groups, slice(start, stop)), whole[start:stop])


def test_sums_over_a_large_matrix_are_as_exact_as_over_a_small_one():
    torch.manual_seed(0)
    rows, columns = 2048, 1025
    values, slope = 1 + 0.1 * torch.rand(2, rows, columns), 1 + 0.1 * torch.rand(rows, columns)
    found = DenseDeltas(values).contract(slope, RowsAndColumns(rows, columns)).double()
    products = values.double() * slope.double()
    exact = torch.cat([products.sum(dim=2), products.sum(dim=1)], dim=1)
    assert ((found - exact).abs() / exact).max() < 5e-7


def test_rows_of_few_bits_are_widened():
    rows, coefficients = torch.randn(3, 10).bfloat16(), torch.randn(3, 10)
    summed = ElementSums(slice(0, 10)).sum(rows, coefficients)
    assert summed.dtype == torch.float32 and torch.allclose(summed, (rows.float() * coefficients).sum(dim=0), atol=1e-6)
    shared = RowColumnSums(2, 5, slice(0, 10), CPU)
    scales = (coefficients[:, :2].unsqueeze(2) + coefficients[:, 2:7].unsqueeze(1)).view(3, 10)
    assert torch.allclose(shared.sum(rows, coefficients[:, :7]), (rows.float() * scales).sum(dim=0), atol=1e-6)
