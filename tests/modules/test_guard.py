"""The guard: a bad step is undone in every optimiser that it watches, and everything after it too."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from adamerge.errors import DivergedError
from adamerge.modules.guard import Guard


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
