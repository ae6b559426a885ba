"""Deltas: what is combined and contracted is the formula's, whatever the storage, the dtype and autocast."""

import weakref

import pytest
import torch

from adamerge.deltas import RUN, SEGMENT, Chunks, DenseDeltas, Ids, TransformedDeltas, Whole
from adamerge.streamed import StreamedDeltas

SHAPE = torch.Size((4, 5, 3))


@pytest.fixture
def models():
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(SHAPE, generator=generator)
    return base, [base + 0.3 * torch.randn(SHAPE, generator=generator) for _ in range(3)]


def storages(base, experts):
    streamed = StreamedDeltas(lambda: base, [lambda e=e: e for e in experts], SHAPE, torch.device("cpu"))
    dense = DenseDeltas(torch.stack([e.float() - base.float() for e in experts]))
    return {"dense": dense, "streamed": streamed, "transformed": TransformedDeltas(streamed, lambda rows: rows * 1.0)}


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


@pytest.mark.parametrize("kind", ["dense", "streamed", "transformed"])
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
    assert (combined.detach().flatten().double() - expected.detach()).abs().max() < 1e-6
    assert (coefficients.grad.double() - exact.grad).abs().max() <= 1e-6 * exact.grad.abs().max()
    assert torch.equal(deltas.contract(slope, groups), coefficients.grad)


@pytest.mark.parametrize("kind", ["dense", "streamed", "transformed"])
def test_gradcheck_in_float64(models, kind):
    base, experts = models
    deltas = storages(base, experts)[kind]
    for groups in (Whole(), Chunks(7), strewn(4)):
        coefficients = torch.randn(3, groups.count, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda c, g=groups: deltas.combine(c, g), coefficients)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 59, 60])
def test_chunks_cover_every_element_once_and_are_even(count):
    slices = Chunks(count).slices(60)
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(60))
    sizes = [s.stop - s.start for s in slices]
    assert len(slices) == count and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


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
    found = torch.cat(list(deltas.blocks(torch.float32)))
    expected = torch.stack([e.double() - base.double() for e in experts]).view(3, -1)
    # one rounding of the inputs to fp32 at most, one of the difference: far from a difference in half precision
    assert found.dtype == torch.float32 and (found.double() - expected).abs().max() < 4e-7
    if expert_dtype in (torch.bfloat16, torch.float16) and base_dtype == expert_dtype:
        halves = torch.stack([e - base for e in experts]).view(3, -1)
        assert not torch.equal(found, halves.float())


@pytest.mark.parametrize("kind", ["dense", "streamed", "transformed"])
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


def test_streamed_holds_one_expert_at_a_time(models):
    base, experts = models
    deltas = storages(base, experts)["streamed"]
    alive = []
    for block in deltas.blocks(torch.float32):
        assert block.shape == (1, 60)
        assert not any(reference() is not None for reference in alive)
        alive.append(weakref.ref(block))
        del block
    assert len(alive) == 3


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


@pytest.mark.parametrize("kind", ["dense", "streamed", "transformed"])
@pytest.mark.parametrize(
    "groups", [Whole(), Chunks(1), Chunks(3), Chunks(7), Chunks(59), Chunks(60), strewn(9)],
    ids=lambda g: f"{type(g).__name__}-{g.count}",
)  # fmt: skip
@pytest.mark.parametrize("piece", [1, 7, 60, 64])
def test_pieces_are_the_whole_and_their_contraction_the_sum(models, monkeypatch, kind, groups, piece):
    base, experts = models
    deltas = storages(base, experts)[kind]
    coefficients, slope = torch.randn(3, groups.count), torch.randn(SHAPE)
    whole, contracted = deltas.combine(coefficients, groups), deltas.contract(slope.double(), groups)
    monkeypatch.setattr("adamerge.streamed.PIECE", piece)
    pieces = list(deltas.pieces(coefficients.requires_grad_(), groups))
    sizes = [min(piece, 60 - start) for start in range(0, 60, piece)] if kind == "streamed" else [60]
    assert [len(part) for part in pieces] == sizes and not any(part.requires_grad for part in pieces)
    assert torch.equal(torch.cat(pieces), whole.flatten())
    assert torch.equal(deltas.combine(coefficients, groups), whole)
    assert torch.allclose(deltas.contract(slope.double(), groups), contracted, rtol=1e-12, atol=1e-12)


def test_transform_sees_all_experts_in_fp32_even_for_float64(models):
    base, experts = models
    seen = []

    def transform(rows):
        seen.append((tuple(rows.shape), rows.dtype))
        return rows

    deltas = TransformedDeltas(storages(base, experts)["streamed"], transform)
    assert next(iter(deltas.blocks(torch.float64))).dtype == torch.float64
    assert seen == [((3, 60), torch.float32)]


@pytest.mark.parametrize("groups", [Whole(), Chunks(3)], ids=["whole", "chunks"])
def test_sums_over_a_large_tensor_are_as_exact_as_over_a_small_one(groups):
    """One running sum in fp32 over so many products would be off by more."""
    numel = 120 * RUN + 77
    torch.manual_seed(0)
    values, slope = 1 + 0.1 * torch.rand(2, numel), 1 + 0.1 * torch.rand(numel)
    found = DenseDeltas(values).contract(slope, groups)
    exact = torch.zeros(2, groups.count, dtype=torch.float64)
    for group, part in enumerate(Chunks(groups.count).slices(numel)):
        exact[:, group] = values[:, part].double() @ slope[part].double()
    assert ((found - exact).abs() / exact).max() < 5e-7


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
    assert len(made) == 2 and groups.kept is None
    assert deltas.contract(torch.tensor([1.0, 1.0, 2.0]), groups).tolist() == [[7.0, 2.0]]
    deltas.combine(coefficients, groups)
    assert len(made) == 3 and groups.kept is not None


def test_mapped_deltas_are_sums_of_experts_at_each_read(models):
    base, experts = models
    matrix = torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, 0.0]])
    for deltas in storages(base, experts).values():
        wanted = torch.einsum("nk,k...->n...", matrix.double(), deltas.dense().double())
        mapped = deltas.mapped(matrix)
        assert (mapped.dense().double() - wanted).abs().max() < 1e-6
        assert (
            torch.equal(mapped.kept(lambda deltas, count: DenseDeltas(deltas.dense()), 2).dense(), mapped.dense())
            and mapped.shape == SHAPE
        )
