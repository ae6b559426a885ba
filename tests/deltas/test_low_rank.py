"""Low-rank deltas: the same sums and contractions as the dense ones, no cross-terms, and never dense when whole."""

from __future__ import annotations

import pytest
import torch
from rounding import gamma
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adamerge.checkpoints.lora_factors import Factors, no_change
from adamerge.deltas.base import DenseDeltas
from adamerge.deltas.groups import Chunks, Components, RowsAndColumns, Whole
from adamerge.deltas.low_rank import JoinedDeltas, LowRankDeltas
from adamerge.deltas.streamed import StreamedDeltas
from adamerge.errors import ConfigError

CPU = torch.device("cpu")


def keep_dense(deltas, count):
    values = deltas.dense()
    assert len(values) == count
    return DenseDeltas(values)


SHAPES = [(12, 7), (4, 3, 2, 2), (1, 5)]
RANKS, SCALES = (2, 0, 5), (0.5, 1.0, -1.75)


def experts(shape, ranks=RANKS, scales=SCALES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    found = []
    for rank, scale in zip(ranks, scales, strict=True):
        left = torch.randn(rows, rank, generator=generator).to(dtype)
        right = torch.randn(rank, columns, generator=generator).to(dtype)
        found.append(Factors(rank, scale, lambda left=left: left, lambda right=right: right))
    return found


def exact(factors, shape):
    """``(experts, numel)`` in float64."""
    return torch.stack([(f.scale * f.left().double() @ f.right().double()).view(-1) for f in factors])


def joined(shape):
    """Dense, low-rank, low-rank, dense; and the same in float64."""
    torch.manual_seed(5)
    low = experts(shape, (2, 3), (0.5, 2.0))
    base, first, last = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    parts = [
        (1, StreamedDeltas(lambda: base, [lambda: first], torch.Size(shape), CPU)),
        (2, LowRankDeltas.of(low, torch.Size(shape), CPU)),
        (1, DenseDeltas(last.unsqueeze(0))),
    ]
    rows = [(first.double() - base.double()).view(1, -1), exact(low, shape), last.double().view(1, -1)]
    return JoinedDeltas(parts), torch.cat(rows)


def both(shape):
    low = experts(shape)
    return {"low rank": (LowRankDeltas.of(low, torch.Size(shape), CPU), exact(low, shape)), "joined": joined(shape)}


def columns_of(groups, numel):
    if isinstance(groups, Whole):
        return torch.zeros(numel, dtype=torch.long)
    edges = [(i + 1) * numel // groups.count for i in range(groups.count)]
    return torch.tensor([next(g for g, edge in enumerate(edges) if e < edge) for e in range(numel)])


@pytest.mark.parametrize("held", [False, True], ids=["read", "held"])
@pytest.mark.parametrize("kind", ["low rank", "joined"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("groups", [Whole(), Chunks(1), Chunks(4)], ids=["whole", "1", "4"])
def test_combine_and_its_transpose_are_the_formula(shape, groups, kind, held):
    deltas, tau = both(shape)[kind]
    deltas = deltas.in_memory(keep_dense, len(tau)) if held else deltas
    assert torch.allclose(deltas.dense().double(), tau.view(-1, *shape), atol=1e-6)
    coefficients = torch.randn(len(tau), groups.count, requires_grad=True)
    slope = torch.randn(shape)
    combined = deltas.combine(coefficients, groups)
    combined.backward(slope)
    wanted = coefficients.detach().double().requires_grad_(True)
    expected = (wanted[:, columns_of(groups, tau.shape[1])] * tau).sum(dim=0)
    expected.backward(slope.double().flatten())
    assert combined.shape == shape and combined.dtype == torch.float32
    # sums over ranks and experts, or over all elements: the terms cancel, their rounding does not
    largest = (wanted.detach().abs()[:, columns_of(groups, tau.shape[1])] * tau.abs()).sum(dim=0).max()
    assert (combined.detach().flatten().double() - expected.detach()).abs().max() <= gamma(64) * largest
    largest = (slope.double().abs().flatten() * tau.abs()).sum(dim=1).max()
    assert (coefficients.grad.double() - wanted.grad).abs().max() <= gamma(64 + tau.shape[1]) * largest


@pytest.mark.parametrize("kind", ["low rank", "joined"])
def test_held_and_read_give_the_same_bits(kind):
    """Training holds factors, export reads them."""
    deltas, tau = both((12, 7))[kind]
    coefficients = torch.randn(len(tau), 1)
    held = deltas.in_memory(keep_dense, len(tau))
    assert torch.equal(deltas.combine(coefficients, Whole()), held.combine(coefficients, Whole()))
    for one, two in zip(deltas.row_batches(torch.float32), held.row_batches(torch.float32), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["low rank", "joined"])
@pytest.mark.parametrize("groups", [Whole(), Chunks(3)], ids=["whole", "3"])
def test_gradcheck_in_float64(kind, groups):
    deltas, tau = both((12, 7))[kind]
    coefficients = torch.randn(len(tau), groups.count, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: deltas.combine(c, groups), coefficients)


PARTS = {"all": None, "whole rows": slice(7, 28), "cut rows": slice(3, 31)}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("kind", ["low rank", "joined"])
@pytest.mark.parametrize("mixed", [False, True], ids=["own", "mixed"])
def test_rows_and_columns_are_the_formula(kind, part, mixed):
    """``sum_k (r_k[i] + c_k[j]) tau_k[i, j]`` and its transpose; also of experts that are sums of others."""
    deltas, tau = both((12, 7))[kind]
    if mixed:
        matrix = torch.randn(2, len(tau))
        deltas, tau = deltas.mapped(matrix), matrix.double() @ tau
    here, groups = part or slice(0, 84), RowsAndColumns(12, 7)
    coefficients, slope = torch.randn(len(tau), 19), torch.randn(here.stop - here.start)
    found = deltas.summed(coefficients, groups, part)
    rows, columns = coefficients[:, :12].double(), coefficients[:, 12:].double()
    scales = (rows.unsqueeze(2) + columns.unsqueeze(1)).view(len(tau), -1)
    size = (scales.abs() * tau.abs()).sum(dim=0).max() + (rows.abs().amax() + columns.abs().amax()) * tau.abs().max()
    assert (found.double() - (scales * tau).sum(dim=0)[here]).abs().max() <= gamma(64) * size
    products = torch.zeros_like(tau)
    products[:, here] = tau[:, here] * slope.double()
    products = products.view(-1, 12, 7)
    wanted = torch.cat([products.sum(dim=2), products.sum(dim=1)], dim=1)
    contracted = deltas.contract(slope, groups, part)
    assert (contracted.double() - wanted).abs().max() <= gamma(128) * len(tau) * products.abs().sum(
        dim=(1, 2)
    ).max() * 4


def test_gradcheck_of_rows_and_columns():
    deltas, tau = both((12, 7))["joined"]
    coefficients = torch.randn(len(tau), 19, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: deltas.combine(c, RowsAndColumns(12, 7)), coefficients)


def test_no_cross_terms():
    """Two experts whose factors would give another product if they were summed before."""
    one = Factors(1, 1.0, lambda: torch.tensor([[1.0], [0.0]]), lambda: torch.tensor([[1.0, 0.0]]))
    two = Factors(1, 1.0, lambda: torch.tensor([[0.0], [1.0]]), lambda: torch.tensor([[0.0, 1.0]]))
    found = LowRankDeltas.of([one, two], torch.Size((2, 2)), CPU).combine(torch.tensor([[2.0], [3.0]]), Whole())
    assert found.tolist() == [[2.0, 0.0], [0.0, 3.0]]


class Largest(TorchDispatchMode):
    """The largest tensor that is made, and how many have so many elements."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            inputs = {x.data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.data_ptr() not in inputs]
            self.sizes += [x.numel() for x in made]
        return result


def terms_of(factors, matrix=None):
    """Each expert's components as numbers, ``(experts, most, numel)`` in float64; of sums of experts all of theirs."""
    every = [f.scale * torch.einsum("in,nj->nij", f.left().double(), f.right().double()).flatten(1) for f in factors]
    if matrix is not None:
        every = [torch.cat([w * own for w, own in zip(row.double(), every, strict=True) if w != 0]) for row in matrix]
    most = max(len(own) for own in every)
    return torch.stack([torch.cat([own, own.new_zeros(most - len(own), own.shape[1])]) for own in every])


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("matrix", [None, torch.tensor([[0.5, 0.0, -2.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])])
def test_components_are_the_formula(matrix, part):
    """``sum_k sum_j c_k[j] u_kj v_kj^T`` and its transpose, of ranks 2, 0 and 5; also of experts that are sums of others."""
    factors = experts((12, 7))
    deltas = LowRankDeltas.of(factors, torch.Size((12, 7)), CPU)
    deltas = deltas if matrix is None else deltas.mapped(matrix)
    terms, here = terms_of(factors, matrix), part or slice(0, 84)
    assert deltas.terms(3) == ([2, 0, 5] if matrix is None else [7, 0, 7])
    groups = Components(max(deltas.terms(3)))
    coefficients, slope = torch.randn(3, groups.count), torch.randn(here.stop - here.start)
    if part is not None and part.start % 7:
        with pytest.raises(ConfigError, match="and these are elements"):  # as of a dense expert
            deltas.summed(coefficients, groups, part)
        return
    products = coefficients.double().unsqueeze(2) * terms
    found = deltas.summed(coefficients, groups, part)
    assert (found.double() - products.sum(dim=(0, 1))[here]).abs().max() <= gamma(20) * products.abs().sum((0, 1)).max()
    contracted = deltas.contract(slope, groups, part)
    sizes = (terms[:, :, here] * slope.double()).abs().sum(dim=2)
    assert contracted.shape == (3, groups.count)
    assert ((contracted.double() - terms[:, :, here] @ slope.double()).abs() <= gamma(84 + 4) * 4 * sizes + 1e-12).all()


def test_one_coefficient_on_all_components_is_that_of_the_whole():
    deltas = LowRankDeltas.of(experts((12, 7)), torch.Size((12, 7)), CPU)
    coefficients = torch.randn(3, 1)
    whole = deltas.summed(coefficients, Whole())
    assert torch.allclose(deltas.summed(coefficients.expand(3, 5), Components(5)), whole, rtol=0, atol=1e-5)


def test_gradcheck_of_components():
    deltas = LowRankDeltas.of(experts((12, 7)), torch.Size((12, 7)), CPU)
    coefficients = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: deltas.combine(c, Components(5)), coefficients)


def test_of_several_kinds_the_terms_are_told_one_after_the_other():
    deltas, _ = joined((12, 7))
    assert deltas.terms(4) == [None, 2, 3, None]


@pytest.mark.parametrize(
    "groups", [Whole(), Components(5), RowsAndColumns(60, 50)], ids=["whole", "components", "rows and columns"]
)
def test_whole_tensors_are_never_dense_per_expert(groups):
    shape = (60, 50)
    deltas = LowRankDeltas.of(experts(shape), torch.Size(shape), CPU)
    coefficients, slope = torch.randn(3, groups.count, requires_grad=True), torch.randn(shape)
    with Largest() as seen:
        combined = deltas.combine(coefficients, groups)
    assert sum(size >= 3000 for size in seen.sizes) == 1  # the sum itself
    with Largest() as seen:
        combined.backward(slope)
    assert max(seen.sizes) < 3000 and coefficients.grad.abs().max() > 0


def test_chunks_make_one_expert_dense_at_a_time():
    deltas = LowRankDeltas.of(experts((60, 50)), torch.Size((60, 50)), CPU)
    assert [block.shape for block in deltas.row_batches(torch.float32)] == [(1, 3000)] * 3


def test_an_untouched_tensor_of_any_shape_adds_nothing():
    for shape in ((), (5,), (0, 3), (2, 3)):
        size = torch.Size(shape)
        deltas = JoinedDeltas(
            [(1, LowRankDeltas.of([no_change(size)], size, CPU)), (1, DenseDeltas(torch.ones(1, *shape)))]
        )
        update = deltas.combine(torch.tensor([[9.0], [0.5]]), Whole())
        assert update.shape == size and torch.equal(update, torch.full(shape, 0.5))
        assert deltas.contract(torch.ones(shape), Whole()).flatten().tolist() == [0.0, float(size.numel())]


@pytest.mark.parametrize("kind", ["low rank", "joined"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mapped_is_the_sum_of_experts(kind, shape):
    deltas, tau = both(shape)[kind]
    torch.manual_seed(6)
    for matrix in (torch.diag(torch.randn(len(tau))), torch.randn(2, len(tau)), torch.randn(5, len(tau))):
        mapped = deltas.mapped(matrix)
        wanted = (matrix.double() @ tau).view(-1, *shape)
        assert torch.allclose(mapped.dense().double(), wanted, atol=2e-6)
        assert torch.allclose(mapped.in_memory(keep_dense, len(matrix)).dense().double(), wanted, atol=2e-6)
        coefficients = torch.randn(len(matrix), 1)
        found = mapped.combine(coefficients, Whole()).double()
        assert torch.allclose(
            found, (coefficients.double().view(-1, 1) * wanted.flatten(1)).sum(0).view(shape), atol=1e-5
        )
        slope = torch.randn(shape)
        contracted = mapped.contract(slope, Whole()).double().flatten()
        assert torch.allclose(contracted, wanted.flatten(1) @ slope.double().flatten(), atol=1e-5)


def test_scaling_keeps_factors_and_sums_of_factors_are_factors():
    deltas, _ = both((12, 7))["low rank"]
    assert isinstance(deltas.mapped(torch.randn(1, 3)), LowRankDeltas)
    mixed, _ = both((12, 7))["joined"]
    scaled = mixed.mapped(torch.diag(torch.tensor([1.0, -1.0, 2.0, 0.5])))
    assert isinstance(scaled, JoinedDeltas) and isinstance(scaled.kinds[1][1], LowRankDeltas)


def test_autocast_leaves_factors_in_fp32():
    deltas, _ = both((12, 7))["low rank"]
    coefficients = torch.full((3, 1), 0.3, requires_grad=True)
    slope = torch.randn(12, 7)
    plain = deltas.combine(coefficients, Whole())
    wanted = torch.autograd.grad(plain, coefficients, slope)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = deltas.combine(coefficients, Whole())
        found = torch.autograd.grad(inside, coefficients, slope)[0]
    assert torch.equal(inside, plain) and torch.equal(found, wanted) and found.dtype == torch.float32


def test_half_precision_factors_are_multiplied_in_fp32():
    low = experts((12, 7), dtype=torch.bfloat16)
    deltas = LowRankDeltas.of(low, torch.Size((12, 7)), CPU)
    assert (deltas.dense().double().flatten(1) - exact(low, (12, 7))).abs().max() < 1e-5
