"""Deltas read from disk: a piece at a time, and the sums of many pieces as exact as one."""

import weakref

import torch

from adamerge.deltas import Chunks, Whole
from adamerge.streamed import PIECE, StreamedDeltas


def streamed(base, experts):
    return StreamedDeltas(lambda: base, [lambda e=e: e for e in experts], base.shape, torch.device("cpu"))


def test_a_piece_is_computed_when_asked_for_and_not_kept(monkeypatch):
    monkeypatch.setattr("adamerge.streamed.PIECE", 7)
    deltas = streamed(torch.randn(60), [torch.randn(60) for _ in range(3)])
    alive = []
    for part in deltas.pieces(torch.ones(3, 1), Whole()):
        assert sum(reference() is not None for reference in alive) == 0
        alive.append(weakref.ref(part))
        del part
    assert len(alive) == 9


def test_many_pieces_are_contracted_without_adding_up_their_rounding():
    numel = 50 * PIECE + 99
    base, experts = torch.zeros(numel), [1 + 0.1 * torch.rand(numel) for _ in range(2)]
    deltas = streamed(base, experts)
    slope = 1 + 0.1 * torch.rand(numel)
    exact = torch.stack([row.double() @ slope.double() for row in experts])
    assert ((deltas.contract(slope, Whole())[:, 0] - exact).abs() / exact).max() < 5e-7


def test_nothing_of_the_tensors_size_is_made_to_contract_or_to_give_pieces():
    """What is alive at most, of all that torch allocates: a few pieces, whatever the size of the tensor."""
    numel = 64 * PIECE
    base = torch.zeros(numel, dtype=torch.bfloat16)
    deltas = streamed(base, [torch.ones(numel, dtype=torch.bfloat16) for _ in range(4)])
    slope, coefficients = torch.ones(numel), torch.full((4, 3), 0.5)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        total = sum(float(piece.double().sum()) for piece in deltas.pieces(coefficients, Chunks(3)))
        found = deltas.contract(slope, Whole())
    assert total == 2 * numel and found.tolist() == [[numel]] * 4
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(sizes) <= 8 * PIECE  # one piece in float64
