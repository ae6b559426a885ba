"""The guard: a bad step is undone in every optimiser that it watches, and everything after it too."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from adamerge.errors import DivergedError
from adamerge.training.nonfinite_guard import Guard


def step(guard: Guard, optimizer, parameter: nn.Parameter, gradient: float) -> None:
    parameter.grad = torch.full_like(parameter, gradient)
    guard.before_step(optimizer)
    optimizer.step()


def test_a_good_step_is_taken_and_projected():
    parameter = nn.Parameter(torch.tensor([0.5, 2.0]))
    guard = Guard(lambda: parameter.clamp_(0, 1))
    step(guard, guard.watch(SGD([parameter], 1.0)), parameter, 0.25)
    guard.poll(1, {})
    assert parameter.tolist() == [0.25, 1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_after_a_bad_step_nothing_moves_in_either_optimiser(bad):
    one, two = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    guard = Guard(lambda: None)
    first, second = guard.watch(Adam([one], 0.1)), guard.watch(SGD([two], 0.1, momentum=0.9))
    step(guard, first, one, 1.0)
    step(guard, second, two, 1.0)
    before = one.detach().clone(), two.detach().clone()
    step(guard, second, two, bad)
    step(guard, first, one, 1.0)
    assert torch.equal(one, before[0]) and torch.equal(two, before[1])
    with pytest.raises(DivergedError, match="step 7: the loss is not finite for task 'b'"):
        guard.wait(7, {"a": torch.tensor(1.0), "b": torch.tensor(bad)})
    with pytest.raises(DivergedError, match="step 7: the gradient is not finite"):
        guard.poll(7, {"a": torch.tensor(1.0)})
    guard.forget()
    guard.poll(8, {})
    step(guard, first, one, 1.0)
    assert not torch.equal(one, before[0])


class Event:
    """Of a device that is far behind: nothing is known before someone waits."""

    def __init__(self):
        self.waited = False

    def query(self):
        return False

    def synchronize(self):
        self.waited = True


def test_where_the_host_is_ahead_it_waits_for_the_step_before_the_last_alone():
    parameter, events = nn.Parameter(torch.ones(2)), []
    guard = Guard(lambda: None)
    optimizer = guard.watch(SGD([parameter], 0.1))
    for number, gradient in enumerate((1.0, float("nan"), 1.0), start=1):
        guard.poll(number - 1, {"a": torch.tensor(float(number))})
        assert [event.waited for event in events] == [True] * (len(events) - 1) + [False] * bool(events)
        step(guard, optimizer, parameter, gradient)
        events.append(Event())
        guard._copied = events[-1]
    with pytest.raises(DivergedError, match="step 2: the gradient"):
        guard.poll(3, {"a": torch.tensor(4.0)})
    assert [event.waited for event in events] == [True, True, False]


def test_the_last_step_is_waited_for():
    parameter, event = nn.Parameter(torch.ones(2)), Event()
    guard = Guard(lambda: None)
    step(guard, guard.watch(SGD([parameter], 0.1)), parameter, float("inf"))
    guard._copied = event
    guard.poll(1, {})
    assert not event.waited
    with pytest.raises(DivergedError, match="step 1"):
        guard.wait(1, {})
    assert event.waited
