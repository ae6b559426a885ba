"""A CPU's libraries: asked once whether they add as if row by row, and used only where they do."""

import pytest
import torch

from adamerge.deltas import cpu_sums, kernels
from adamerge.deltas.cpu_sums import (
    _adds_one_by_one,
    _bags_add_one_by_one,
    add_each,
    bag_size,
    rows_at_once,
    summed_in_bags,
)
from adamerge.deltas.kernels import sum_rows
from adamerge.deltas.tuning import BAG, FEW, FEWEST


def test_rows_are_added_one_after_the_other_each_product_fused_with_its_addition():
    out, rows, coefficients = torch.tensor([1.0]), torch.tensor([[2.0], [3.0]]), torch.tensor([0.5, 10.0])
    add_each(out, rows, coefficients)
    assert out.tolist() == [1 + 1 + 30]


def test_a_library_is_not_used_for_rows_that_it_would_round(monkeypatch):
    for asked in ("_adds_one_by_one", "_bags_add_one_by_one"):
        monkeypatch.setattr(cpu_sums, asked, lambda: True)
    rows, coefficients = torch.ones(FEW, 2 * FEWEST), torch.ones(FEW)
    assert rows_at_once(rows, coefficients) == FEW and bag_size(rows, coefficients, 2 * FEWEST) == 2 * FEWEST
    assert rows_at_once(rows.bfloat16(), coefficients) == bag_size(rows.bfloat16(), coefficients, 2 * FEWEST) == 0
    # no piece of which both rows and their distance are a multiple
    assert bag_size(rows[:, 1:], coefficients, 2 * FEWEST - 1) == 0
    assert bag_size(rows, coefficients, FEWEST) == FEWEST and bag_size(rows, coefficients, FEWEST - 1) == 0


def test_a_library_that_adds_in_another_order_is_found_out(monkeypatch):
    def backwards(rows, coefficients, size):
        return (coefficients.flip(0) * rows.flip(0)).sum(dim=0)

    monkeypatch.setattr(cpu_sums, "summed_in_bags", backwards)
    assert not _bags_add_one_by_one.__wrapped__()


def test_bags_are_the_sum_of_all_rows():
    rows, coefficients = torch.arange(12.0).view(3, 4), torch.tensor([1.0, 10.0, 100.0])
    assert summed_in_bags(rows, coefficients.unsqueeze(1), 2).tolist() == [840, 951, 1062, 1173]
    assert summed_in_bags(rows, torch.stack([coefficients, 2 * coefficients], dim=1), 2).tolist() == [
        840,
        951,
        2124,
        2346,
    ]


@pytest.mark.skipif(not _bags_add_one_by_one(), reason="this processor's lookup adds in another order")
def test_all_rows_are_added_at_once_where_they_are_read_from(monkeypatch):
    """Of a part of wider rows, of one row several times, of columns side by side: the same, and no row by row."""
    rows, coefficients = torch.randn(FEW, 4 * BAG), torch.randn(FEW, 1)
    given = {
        "a part": rows[:, BAG : 2 * BAG + FEWEST],
        "rows that end early": rows[:, :FEWEST],
        "every other row": rows.repeat_interleave(2, dim=0)[::2],
        "one row": rows[:1].expand(FEW, -1),
        "nothing": rows[:, :0],
        "columns": rows.t().contiguous().t(),
    }
    adds = []
    real = kernels.add_each
    monkeypatch.setattr(kernels, "add_each", lambda *arguments: adds.append(1) or real(*arguments))
    monkeypatch.setattr(cpu_sums, "_adds_one_by_one", lambda: False)
    for what, own in given.items():
        wanted = (coefficients.double() * own.double()).sum(dim=0)
        assert torch.allclose(sum_rows(own, coefficients[:, 0]).double(), wanted, atol=1e-5), what
        assert bool(adds) == (what in {"nothing", "columns"}), what
        adds.clear()


def test_the_libraries_are_asked_on_the_cpu_whatever_the_default_device_is():
    with torch.device("meta"):
        assert isinstance(_adds_one_by_one.__wrapped__(), bool)
        assert isinstance(_bags_add_one_by_one.__wrapped__(), bool)
