"""Deltas read from disk: a piece at a time, and the sums of many pieces as exact as one."""

import torch

from adamerge.deltas.groups import Chunks, Whole
from adamerge.deltas.quantized import EncodedDeltas, Floats
from adamerge.deltas.streamed import StreamedDeltas
from adamerge.deltas.tuning import FEW, PIECE


def streamed(base, experts):
    return StreamedDeltas(lambda: base, [lambda e=e: e for e in experts], base.shape, torch.device("cpu"))


def test_many_pieces_are_contracted_without_adding_up_their_rounding():
    numel = 12 * PIECE + 99
    base, experts = torch.zeros(numel), [1 + 0.1 * torch.rand(numel) for _ in range(2)]
    deltas = streamed(base, experts)
    slope = 1 + 0.1 * torch.rand(numel)
    exact = torch.stack([row.double() @ slope.double() for row in experts])
    assert ((deltas.contract(slope, Whole())[:, 0] - exact).abs() / exact).max() < 5e-7


def test_nothing_of_the_tensors_size_is_made_to_contract_or_to_sum_in_parts(cut):
    """What is alive at most, of all that torch allocates: a few pieces, whatever the size of the tensor."""
    cut(1 << 15)
    numel = 64 << 15
    base = torch.zeros(numel, dtype=torch.bfloat16)
    deltas = streamed(base, [torch.ones(numel, dtype=torch.bfloat16) for _ in range(4)])
    slope, coefficients = torch.ones(numel), torch.full((4, 3), 0.5)
    streamed(torch.zeros(1), [torch.ones(1)]).summed(torch.ones(1, 1), Whole())  # asks the library, once, how it adds
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        total = sum(float(values.double().sum()) for _, values in deltas.sums(coefficients, Chunks(3)))
        found = deltas.contract(slope, Whole())
    assert total == 2 * numel and found.tolist() == [[numel]] * 4
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(sizes) <= 4 * FEW << 15  # the rows of a piece, in fp32


def test_files_are_opened_once_for_several_reads_in_a_row(cut):
    cut(7)
    base, experts, reads = torch.randn(60), [torch.randn(60) for _ in range(3)], []
    deltas = StreamedDeltas(
        lambda: reads.append("base") or base,
        [lambda k=k: reads.append(k) or experts[k] for k in range(3)],
        base.shape,
        torch.device("cpu"),
    )
    found = deltas.summed(torch.ones(3, 1), Whole())
    assert reads == ["base", 0, 1, 2]
    opened = deltas.opened()
    assert torch.equal(torch.cat([opened.summed(torch.ones(3, 1), Whole(), part) for part in deltas.pieces()]), found)
    deltas.contract(torch.ones(60), Whole())
    assert reads == ["base", 0, 1, 2] * 3


def test_a_few_experts_of_a_piece_are_in_memory_at_a_time():
    deltas = streamed(torch.randn(60), [torch.randn(60) for _ in range(2 * FEW + 1)])
    places, counts = set(), []
    for block in deltas.row_batches(torch.float32, slice(10, 20)):
        places.add(block.data_ptr())
        counts.append(len(block))
    assert counts == [FEW, FEW, 1] and len(places) == 1


def test_all_rows_at_once_are_those_of_all_blocks():
    """Although a block's memory is that of the one before."""
    base, experts = torch.randn(60), [torch.randn(60) for _ in range(2 * FEW + 1)]
    wanted = torch.stack(experts) - base
    deltas = streamed(base, experts)
    assert torch.equal(deltas.rows(torch.float32), wanted)
    assert torch.equal(deltas.mapped(torch.eye(2 * FEW + 1).flip(0)).rows(torch.float32), wanted.flip(0))
    kept = EncodedDeltas.of(deltas, Floats(torch.bfloat16), lambda row: row)
    assert torch.equal(kept.rows(torch.float32), wanted.bfloat16().float())


def test_a_float64_expert_is_told_from_its_base_in_float64():
    base = torch.randn(60, dtype=torch.float64)
    moved = base + 1e-12
    deltas = streamed(base, [base.clone(), moved])
    found = deltas.rows(torch.float32)
    assert found.dtype == torch.float32 and torch.equal(found[0], torch.zeros(60))
    assert torch.equal(found[1], (moved - base).float())
