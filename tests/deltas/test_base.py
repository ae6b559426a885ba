"""Deltas: what is combined and contracted is the formula's, whatever the storage, the dtype and autocast."""

import pytest
import torch
from rounding import gamma

from adamerge.deltas.base import DenseDeltas, TransformedDeltas
from adamerge.deltas.groups import Chunks, Whole
from adamerge.deltas.streamed import StreamedDeltas
from deltas.test_groups import columns_of, strewn

SHAPE = torch.Size((4, 5, 3))


@pytest.fixture
def models():
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(SHAPE, generator=generator)
    return base, [base + 0.3 * torch.randn(SHAPE, generator=generator) for _ in range(3)]


def storages(base, experts):
    streamed = StreamedDeltas(lambda: base, [lambda e=e: e for e in experts], SHAPE, torch.device("cpu"))
    dense = DenseDeltas(torch.stack([e.float() - base.float() for e in experts]))
    return {
        "dense": dense,
        "streamed": streamed,
        "transformed": TransformedDeltas(streamed, lambda rows, _: rows * 1.0),
        "local": TransformedDeltas(streamed, lambda rows, _: rows * 1.0, local=True),
    }


@pytest.mark.parametrize("kind", ["dense", "streamed", "transformed", "local"])
@pytest.mark.parametrize(
    "groups", [Whole(), Chunks(1), Chunks(2), Chunks(7), Chunks(60), strewn(9), strewn(1)],
    ids=lambda g: f"{type(g).__name__}-{g.count}",
)  # fmt: skip
def test_combine_and_its_transpose_are_the_formula(models, kind, groups):
    base, experts = models
    deltas = storages(base, experts)[kind]
    coefficients = torch.randn(3, groups.count, requires_grad=True)
    slope = torch.randn(SHAPE)
    combined = deltas.combine(coefficients, groups)
    combined.backward(slope)

    tau = torch.stack([e.double() - base.double() for e in experts]).view(3, -1)
    exact = coefficients.detach().double().requires_grad_(True)
    expected = (exact[:, columns_of(groups, 60)] * tau).sum(dim=0)
    expected.backward(slope.double().flatten())
    assert combined.shape == SHAPE and combined.dtype == torch.float32
    sizes = (exact.detach().abs()[:, columns_of(groups, 60)] * tau.abs()).sum(dim=0)
    assert ((combined.detach().flatten().double() - expected.detach()).abs() <= gamma(4) * sizes).all()
    sizes = (slope.double().flatten().abs() * tau.abs()).sum(dim=1, keepdim=True)  # of a group's elements, at most all
    assert ((coefficients.grad.double() - exact.grad).abs() <= gamma(61) * sizes).all()
    assert torch.equal(deltas.contract(slope, groups), coefficients.grad)


@pytest.mark.parametrize("kind", ["dense", "streamed", "transformed", "local"])
def test_gradcheck_in_float64(models, kind):
    base, experts = models
    deltas = storages(base, experts)[kind]
    for groups in (Whole(), Chunks(7), strewn(4)):
        coefficients = torch.randn(3, groups.count, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda c, g=groups: deltas.combine(c, g), coefficients)


@pytest.mark.parametrize("shape", [(), (1,), (0, 3)])
def test_scalars_and_empty_tensors(shape):
    deltas = DenseDeltas(torch.ones(2, *shape))
    update = deltas.combine(torch.tensor([[0.25], [0.5]]), Whole())
    assert update.shape == torch.Size(shape) and torch.equal(update, torch.full(shape, 0.75))
    assert deltas.contract(torch.ones(shape), Whole()).tolist() == [[float(update.numel())]] * 2


@pytest.mark.parametrize("base_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("expert_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_streamed_subtracts_in_fp32_whatever_is_stored(models, base_dtype, expert_dtype):
    base, experts = models[0].to(base_dtype), [e.to(expert_dtype) for e in models[1]]
    deltas = storages(base, experts)["streamed"]
    found = torch.cat(list(deltas.row_batches(torch.float32)))
    expected = torch.stack([e.double() - base.double() for e in experts]).view(3, -1)
    # one rounding of the inputs to fp32 at most, one of the difference: far from a difference in half precision
    assert found.dtype == torch.float32 and (found.double() - expected).abs().max() < 4e-7
    if expert_dtype in (torch.bfloat16, torch.float16) and base_dtype == expert_dtype:
        halves = torch.stack([e - base for e in experts]).view(3, -1)
        assert not torch.equal(found, halves.float())


@pytest.mark.parametrize("kind", ["dense", "streamed", "transformed", "local"])
def test_autocast_leaves_forward_and_backward_in_fp32(models, kind):
    base, experts = models
    deltas = storages(base, experts)[kind]
    coefficients = torch.full((3, 2), 0.3, requires_grad=True)
    slope = torch.randn(SHAPE)
    plain = deltas.combine(coefficients, Chunks(2))
    wanted = torch.autograd.grad(plain, coefficients, slope)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = deltas.combine(coefficients, Chunks(2))
        found = torch.autograd.grad(inside, coefficients, slope)[0]
    assert torch.equal(inside, plain) and inside.dtype == torch.float32
    assert torch.equal(found, wanted) and found.dtype == torch.float32


def test_streamed_reads_again_each_time_and_never_between(models):
    base, experts = models
    reads = []

    def read(index):
        reads.append(index)
        return experts[index]

    deltas = StreamedDeltas(lambda: base, [lambda i=i: read(i) for i in range(3)], SHAPE, torch.device("cpu"))
    assert reads == []
    coefficients = torch.ones(3, 1, requires_grad=True)
    combined = deltas.combine(coefficients, Whole())
    assert reads == [0, 1, 2]
    combined.sum().backward()
    assert reads == [0, 1, 2, 0, 1, 2]


def test_dense_stacks_experts_in_order(models):
    base, experts = models
    for deltas in storages(base, experts).values():
        assert deltas.dense().shape == (3, *SHAPE)
        assert torch.equal(deltas.dense(), torch.stack([e - base for e in experts]))


def test_storages_give_the_same_bits(models):
    """Training holds deltas, export reads them: both must merge to the same number."""
    generator = torch.Generator().manual_seed(3)
    size = torch.Size((857, 131))  # three pieces and a rest
    base = torch.randn(size, generator=generator)
    experts = [base + 0.01 * torch.randn(size, generator=generator) for _ in range(7)]
    streamed = StreamedDeltas(lambda: base, [lambda e=e: e for e in experts], size, torch.device("cpu"))
    dense = DenseDeltas(streamed.dense())
    coefficients = torch.rand(7, 3, generator=generator)
    for groups in (Whole(), Chunks(3), strewn(3, size.numel())):
        part = coefficients[:, : groups.count].contiguous()
        one, two = dense.combine(part, groups), streamed.combine(part, groups)
        assert torch.equal(one, two), f"{int((one != two).sum())} of {one.numel()} elements differ"


def test_transform_sees_all_experts_in_fp32_even_for_float64(models):
    base, experts = models
    seen = []

    def transform(rows, part):
        seen.append((tuple(rows.shape), rows.dtype, part))
        return rows

    deltas = TransformedDeltas(storages(base, experts)["streamed"], transform)
    assert next(iter(deltas.row_batches(torch.float64))).dtype == torch.float64
    assert seen == [((3, 60), torch.float32, slice(0, 60))]


def test_mapped_deltas_are_sums_of_experts_at_each_read(models):
    base, experts = models
    matrix = torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, 0.0]])
    for deltas in storages(base, experts).values():
        wanted = torch.einsum("nk,k...->n...", matrix.double(), deltas.dense().double())
        mapped = deltas.mapped(matrix)
        assert (mapped.dense().double() - wanted).abs().max() < 1e-6
        assert (
            torch.equal(mapped.in_memory(lambda deltas, count: DenseDeltas(deltas.dense()), 2).dense(), mapped.dense())
            and mapped.shape == SHAPE
        )


@pytest.mark.parametrize("kind", ["dense", "streamed", "transformed", "local"])
@pytest.mark.parametrize(
    "groups", [Whole(), Chunks(1), Chunks(3), Chunks(7), Chunks(59), Chunks(60), strewn(9)],
    ids=lambda g: f"{type(g).__name__}-{g.count}",
)  # fmt: skip
@pytest.mark.parametrize("piece", [1, 7, 60, 64])
def test_whatever_the_pieces_sums_are_the_same_bits_and_contractions_the_same(models, cut, kind, groups, piece):
    base, experts = models
    deltas = storages(base, experts)[kind]
    coefficients, slope = torch.randn(3, groups.count), torch.randn(SHAPE)
    whole, contracted = deltas.combine(coefficients, groups), deltas.contract(slope.double(), groups)
    cut(piece)
    sizes = [min(piece, 60 - start) for start in range(0, 60, piece)] if kind != "transformed" else [60]
    assert [part.stop - part.start for part in deltas.pieces()] == sizes
    assert torch.equal(deltas.combine(coefficients, groups), whole)
    assert torch.allclose(deltas.contract(slope.double(), groups), contracted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["dense", "streamed", "transformed", "local"])
@pytest.mark.parametrize("groups", [Whole(), Chunks(7), strewn(9)], ids=lambda g: type(g).__name__)
@pytest.mark.parametrize("edges", [(0, 0), (0, 13), (13, 41), (41, 60), (60, 60)])
@pytest.mark.parametrize("piece", [5, 64])
def test_a_part_takes_the_groups_of_the_whole(models, cut, kind, groups, edges, piece):
    cut(piece)
    deltas, part = storages(*models)[kind], slice(*edges)
    coefficients = torch.randn(3, groups.count, requires_grad=True)
    slope = torch.zeros(60)
    slope[part] = torch.randn(edges[1] - edges[0])
    whole = deltas.combine(coefficients, groups).flatten()
    assert torch.equal(deltas.summed(coefficients.detach(), groups, part), whole[part])
    assert torch.allclose(deltas.contract(slope[part], groups, part), deltas.contract(slope, groups), atol=1e-6)
    (contracted,) = torch.autograd.grad(whole, coefficients, slope)
    assert torch.allclose(deltas.contract(slope[part], groups, part), contracted, atol=1e-6)
    assert torch.equal(torch.cat(list(deltas.row_batches(torch.float32, part))), deltas.dense().view(3, -1)[:, part])


@pytest.mark.parametrize("kind", ["dense", "streamed"])
@pytest.mark.parametrize("size", [None, 1, 5])
@pytest.mark.parametrize("edges", [None, (13, 41)])
def test_sums_come_in_pieces_of_the_asked_size_without_autograd(kind, size, edges):
    deltas = storages(torch.randn(SHAPE), [torch.randn(SHAPE) for _ in range(3)])[kind]
    coefficients, part = torch.randn(3, 7, requires_grad=True), None if edges is None else slice(*edges)
    pieces = list(deltas.sums(coefficients.detach(), Chunks(7), part, size))
    wanted = deltas.combine(coefficients, Chunks(7)).detach().reshape(-1)[part or slice(None)]
    assert len(pieces) == (1 if size is None else -(-len(wanted) // size))
    assert not any(values.requires_grad for _, values in pieces)
    assert torch.equal(torch.cat([values for _, values in pieces]), wanted)
    assert all(torch.equal(wanted[piece], values) for piece, values in pieces)


def test_a_local_transform_sees_a_piece_of_all_experts_and_another_the_whole(models, cut):
    cut(25)
    for local, parts in ((True, [slice(0, 25), slice(25, 50), slice(50, 60)]), (False, [slice(0, 60)])):
        seen = []
        deltas = TransformedDeltas(
            storages(*models)["streamed"],
            lambda rows, part, seen=seen: seen.append((tuple(rows.shape), part)) or rows,
            local,
        )
        deltas.summed(torch.ones(3, 1), Whole())
        assert seen == [((3, part.stop - part.start), part) for part in parts]
