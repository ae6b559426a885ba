"""Span sums: what pieces contribute is added where it belongs, in float64 where it meets, and nothing is made for nothing."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adamerge.deltas.base import DenseDeltas
from adamerge.deltas.groups import Elements
from adamerge.deltas.span_sums import SpanSums

from .test_groups import GROUPS, used_by


class Counter(TorchDispatchMode):
    """Elements of every operation that is no view."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.elements += max(
                (x.numel() for x in tree_leaves((args, found)) if isinstance(x, torch.Tensor)), default=0
            )
        return found


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("piece", [60, 13])
def test_pieces_are_added_up_where_they_belong(groups, piece, monkeypatch):
    """Of whole numbers, which no order rounds; one piece and several, of a part and of all."""
    deltas, slope = DenseDeltas(torch.randint(-8, 8, (3, 60)).float()), torch.randint(-8, 8, (60,)).float()
    monkeypatch.setattr(deltas, "piece", piece)
    for part in (slice(0, 60), slice(5, 49), slice(12, 12)):
        wanted = (deltas.values[:, part] * slope[part]) @ used_by(groups, 60)[:, part].t()
        assert torch.equal(deltas.contract(slope[part], groups, part), wanted)


def test_one_coefficient_an_element_takes_memory_once_however_many_pieces(monkeypatch):
    """Pieces times elements is what a tensor of sums for each piece would be."""
    numel, pieces = 1 << 12, 64
    deltas = DenseDeltas(torch.randn(2, numel))
    monkeypatch.setattr(deltas, "piece", numel // pieces)
    with Counter() as counter:
        found = deltas.contract(torch.randn(numel), Elements(numel))
    # the zeros, each piece's products and their addition; once more of a model's gradient that is drawn here
    assert found.shape == (2, numel) and found.dtype == torch.float32
    assert counter.elements <= 3 * 2 * numel + 3 * numel


def test_one_piece_that_touches_all_is_the_result_itself():
    sums, own = SpanSums(3, one=True, apart=False), torch.randn(2, 3)
    sums.add(0, slice(0, 3), own)
    assert sums.result(torch.float32).data_ptr() == own.data_ptr()


def test_what_meets_is_added_in_float64():
    """In fp32, one after the other, the small ones would all be lost."""
    sums = SpanSums(2, one=False, apart=False)
    sums.add(0, slice(0, 2), torch.tensor([[2.0**24, 1.0]]))
    for _ in range(8):
        sums.add(0, slice(0, 1), torch.ones(1, 1))
    assert sums.result(torch.float32).tolist() == [[2.0**24 + 8, 1.0]]


def test_experts_come_a_few_at_a_time():
    sums = SpanSums(2, one=False, apart=True)
    for first, span in ((0, slice(0, 1)), (2, slice(0, 1)), (0, slice(1, 2)), (2, slice(1, 2))):
        sums.add(first, span, torch.full((2, 1), first + span.start + 1.0))
    assert sums.result(torch.float32).tolist() == [[1.0, 2.0], [1.0, 2.0], [3.0, 4.0], [3.0, 4.0]]
