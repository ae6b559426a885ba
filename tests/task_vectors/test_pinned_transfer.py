"""The conveyor: buffers used in turn, what is on them good until the next; an arena that wastes little."""

from __future__ import annotations

import pytest
import torch

from adamerge.task_vectors.pinned_transfer import Arena, Conveyor

CPU = torch.device("cpu")


def test_each_tensor_arrives_whole_in_one_of_two_buffers():
    tensors = [
        torch.randn(size).to(dtype) for size, dtype in ((7, torch.float32), (9, torch.bfloat16), (7, torch.half))
    ]
    tensors.append(torch.arange(5, dtype=torch.uint8))
    conveyor, places, before = Conveyor(CPU, 28), set(), None
    for _ in range(2):
        for tensor, there in zip(tensors, conveyor(tensors), strict=True):
            assert torch.equal(there, tensor) and there.dtype == tensor.dtype
            assert there.data_ptr() != before  # the one before is not written to while this one is on its way
            before = there.data_ptr()
            places.add(before)
    assert len(places) == 2


def test_streams_wait_for_each_other_in_the_order_that_keeps_buffers_whole(monkeypatch):
    """Each copy waits for the work on what was in its buffer, each use for the copy; the host waits for nothing."""
    told = []

    class Event:
        def __init__(self):
            self.number = len([1 for line in told if line[0] == "event"])
            told.append(("event", self.number))

        def record(self, stream):
            told.append(("record", self.number, stream.name))

        def synchronize(self):
            raise AssertionError("the host waited")

    class Stream:
        def __init__(self, name="copy"):
            self.name = name

        def wait_event(self, event):
            told.append(("wait", event.number, self.name))

        def wait_stream(self, stream):
            told.append(("behind", stream.name, self.name))

    current = Stream("compute")
    monkeypatch.setattr(torch.cpu, "Event", Event)
    monkeypatch.setattr(torch.cpu, "Stream", Stream)
    monkeypatch.setattr(torch.cpu, "current_stream", lambda device=None: current)
    monkeypatch.setattr(torch.cpu, "stream", lambda stream: torch.autograd.profiler.record_function(stream.name))
    conveyor = Conveyor(CPU, 4)
    assert told == [("event", n) for n in range(4)] + [("behind", "compute", "copy")]
    told.clear()
    for _ in conveyor([torch.ones(1)] * 3):
        told.append(("used",))
    turns = []
    for filled, done in ((0, 2), (1, 3), (0, 2)):
        turns += [("wait", done, "copy"), ("record", filled, "copy"), ("wait", filled, "compute"), ("used",)]
        turns += [("record", done, "compute")]
    assert told == turns


def test_an_arena_holds_copies_side_by_side():
    arena = Arena(3 * 64 + 128, 100, pinned=False)
    given = [torch.randn(25), torch.randn(3, 2), torch.tensor(1.5), torch.randn(4).bfloat16()]
    held = [arena.put(tensor) for tensor in given]
    for one, other in zip(held, given, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype and one.shape == other.shape
    assert len({tensor.untyped_storage().data_ptr() for tensor in held}) == 1
    assert held[0].untyped_storage().nbytes() == 3 * 64 + 128 and arena.left == 0
    given[0].zero_()
    assert held[0].any()


@pytest.mark.parametrize("megabytes", [1, 60, 100, 300])
def test_an_arena_leaves_at_most_a_quarter_empty(megabytes, monkeypatch):
    made = []
    monkeypatch.setattr(torch, "empty", lambda size, **_: made.append(size) or Lengths(size))
    size = megabytes << 20
    arena = Arena(40 * size, size, pinned=False)
    for _ in range(40):
        arena.put(Lengths(size))
    rounded = [1 << (one - 1).bit_length() for one in made if one]
    assert 40 * size <= sum(made) <= 1.25 * 40 * size
    assert sum(rounded[:-1]) == sum(made[:-1])  # all but the last are what the allocator gives anyway


class Lengths:
    """A tensor of which only the length is known, so that gigabytes can be put."""

    dtype, shape = torch.uint8, ()

    def __init__(self, size: int) -> None:
        self.nbytes = size

    def __len__(self) -> int:
        return self.nbytes

    def __getitem__(self, which: slice) -> Lengths:
        return Lengths(len(range(*which.indices(self.nbytes))))

    def view(self, _: object) -> Lengths:
        return self

    def copy_(self, _: object) -> Lengths:
        return self
