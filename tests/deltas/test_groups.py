"""Groups: every element has one coefficient, and sums over many elements are as exact as over few."""

import pytest
import torch

from adamerge.deltas.base import DenseDeltas
from adamerge.deltas.groups import Chunks, Elements, Ids, RowsAndColumns, Whole
from adamerge.deltas.tuning import SEGMENT

CPU = torch.device("cpu")


def columns_of(groups, numel):
    """Of each element: its coefficient's column; written out once more, from the definition of even chunks."""
    if isinstance(groups, Whole):
        return torch.zeros(numel, dtype=torch.long)
    if isinstance(groups, Ids):
        return torch.tensor([int(i) for i in groups.make()])
    bounds = [i * numel // groups.count for i in range(groups.count + 1)]
    return torch.tensor([i for i in range(groups.count) for _ in range(bounds[i + 1] - bounds[i])])


def used_by(groups, numel):
    """``(coefficients, elements)``: how often each element's coefficient is each of them."""
    uses, elements = torch.zeros(groups.count, numel), torch.arange(numel)
    if isinstance(groups, RowsAndColumns):
        uses[elements // groups.columns, elements] = 1
        uses[groups.rows + elements % groups.columns, elements] = 1
    else:
        uses[elements if isinstance(groups, Elements) else columns_of(groups, numel), elements] = 1
    return uses


def strewn(count, numel=60, dtype=torch.uint8):
    ids = torch.randint(0, count, (numel,), generator=torch.Generator().manual_seed(7)).to(dtype)
    return Ids(count, lambda: ids)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 59, 60])
def test_chunks_cover_every_element_once_and_are_even(count):
    shared = Chunks(count).within(slice(0, 60), 60, CPU)
    assert shared.touched == slice(0, count)
    used = shared.sum(torch.ones(1, 60), torch.arange(float(count)).unsqueeze(0)).long().bincount()
    assert len(used) == count and used.min() >= 1 and used.max() - used.min() <= 1


GROUPS = {
    "whole": Whole(), "uneven": Chunks(7), "even": Chunks(6), "one each": Chunks(60), "strewn": strewn(9),
    "elements": Elements(60), "rows and columns": RowsAndColumns(5, 12), "one row": RowsAndColumns(1, 60),
    "one column": RowsAndColumns(60, 1),
}  # fmt: skip


@pytest.fixture(params=[1 << 10, 4], ids=["indexed", "by themselves"])
def _short_runs(request, monkeypatch):
    """Runs of unequal lengths, either way of summing them."""
    monkeypatch.setattr("adamerge.deltas.groups.LONGEST_INDEXED", request.param)


@pytest.mark.usefixtures("_short_runs")
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
def test_a_part_has_the_coefficients_of_its_elements(groups):
    """Whatever is cut where: what each element gets, with the same bits, and what each coefficient gets of it."""
    uses = used_by(groups, 60)
    coefficients, rows = torch.randn(2, groups.count), torch.randn(2, 60)
    whole = groups.within(slice(0, 60), 60, CPU).sum(rows, coefficients)
    for start in range(0, 60, 7):
        for stop in range(start, 61, 9):
            part = slice(start, stop)
            shared, out, slope = groups.within(part, 60, CPU), torch.zeros(stop - start), torch.randn(stop - start)
            shared.accumulate(out, rows[:, part], coefficients)
            assert torch.equal(shared.sum(rows[:, part], coefficients), out) and torch.equal(out, whole[part])
            assert torch.allclose(out, ((coefficients @ uses)[:, part] * rows[:, part]).sum(dim=0), atol=1e-6)
            wanted = (rows[:, part] * slope) @ uses[:, part].t()
            assert torch.allclose(shared.contract(rows[:, part], slope), wanted[:, shared.touched], atol=1e-5)
            wanted[:, shared.touched] = 0
            assert not wanted.any()  # no other coefficient is of this part


def test_sums_by_id_are_exact_over_many_runs():
    """Many runs and a rest: what one run of fp32 sums would lose is kept."""
    numel = 40 * SEGMENT + 1234
    groups = strewn(5, numel, torch.int16)
    values, slope = 1 + 0.1 * torch.rand(2, numel), 1 + 0.1 * torch.rand(numel)
    found = DenseDeltas(values).contract(slope, groups)
    exact = torch.stack([
        torch.zeros(5, dtype=torch.float64).index_add_(0, columns_of(groups, numel), row.double() * slope.double())
        for row in values
    ])  # fmt: skip
    assert found.dtype == torch.float32 and ((found - exact).abs() / exact).max() < 5e-7


def test_ids_are_made_when_needed_and_kept_from_the_first_contraction_on():
    made = []
    ids = torch.tensor([0, 1, 0], dtype=torch.uint8)
    groups = Ids(2, lambda: made.append(1) or ids)
    deltas = DenseDeltas(torch.tensor([[1.0, 2.0, 3.0]]))
    coefficients = torch.tensor([[10.0, 100.0]])
    for _ in range(2):
        assert deltas.combine(coefficients, groups).tolist() == [10.0, 200.0, 30.0]
    assert len(made) == 2 and groups.ids is None
    assert deltas.contract(torch.tensor([1.0, 1.0, 2.0]), groups).tolist() == [[7.0, 2.0]]
    deltas.combine(coefficients, groups)
    assert len(made) == 3 and groups.ids is not None
