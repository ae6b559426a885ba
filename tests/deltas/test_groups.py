"""Groups: every element has one coefficient, and sums over many elements are as exact as over few."""

import pytest
import torch

from adamerge.deltas.base import DenseDeltas
from adamerge.deltas.groups import Chunks, Ids, Whole
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


def strewn(count, numel=60, dtype=torch.uint8):
    ids = torch.randint(0, count, (numel,), generator=torch.Generator().manual_seed(7)).to(dtype)
    return Ids(count, lambda: ids)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 59, 60])
def test_chunks_cover_every_element_once_and_are_even(count):
    slices = Chunks(count).within(slice(0, 60), 60, CPU).slices
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(60))
    sizes = [s.stop - s.start for s in slices]
    assert len(slices) == count and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("groups", [Whole(), Chunks(7), Chunks(60), strewn(9)], ids=lambda g: type(g).__name__)
def test_a_part_has_the_coefficients_of_its_elements(groups):
    """Whatever is cut where: what each element gets, and what each coefficient gets of it."""
    columns = columns_of(groups, 60)
    coefficients, rows = torch.randn(2, groups.count), torch.randn(2, 60)
    for start in range(0, 60, 7):
        for stop in range(start, 61, 9):
            part = slice(start, stop)
            shared, out, slope = groups.within(part, 60, CPU), torch.zeros(stop - start), torch.randn(stop - start)
            shared.accumulate(out, rows[:, part], coefficients)
            assert torch.equal(shared.sum(rows[:, part], coefficients), out)
            assert torch.allclose(out, (coefficients[:, columns[part]] * rows[:, part]).sum(dim=0), atol=1e-6)
            wanted = torch.zeros(2, groups.count).index_add_(1, columns[part], rows[:, part] * slope)
            assert torch.allclose(shared.contract(rows[:, part], slope), wanted, atol=1e-5)


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
