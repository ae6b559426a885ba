"""A guard against gradients that are not finite: such a step is undone, and the host learns of it without waiting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adamerge.errors import DivergedError


class _Step(NamedTuple):
    """A step's number and losses, whether it or one before it was bad, and when the host knows that."""

    number: int
    losses: Mapping[str, Tensor]
    bad: Tensor | None
    copied: torch.cuda.Event | None


class Guard:
    """Settles every step of the optimisers it watches: projected, or undone when the gradient was not finite.

    From the first bad step on nothing moves any more, whichever optimiser it was; so the last good state stands. What is
    held never moves: its gradient is 0 for the optimiser, and what decay or momentum make of it is undone.

    Args:
        project: puts the coefficients back into their set.
    """

    def __init__(self, project: Callable[[], None]) -> None:
        self.project = project
        self._held: dict[nn.Parameter, Tensor] = {}
        self._before: dict[Optimizer, list[Tensor]] = {}
        self.forget()

    def forget(self) -> None:
        """Forgets the bad steps and the held elements of an earlier fit."""
        self._bad: Tensor | None = None
        self._flag: Tensor | None = None  # its copy on the host
        self._copied: torch.cuda.Event | None = None
        self._earlier: _Step | None = None

    def hold(self, masks: Mapping[nn.Parameter, Tensor]) -> None:
        """Keeps these elements of parameters where they are from now on, and no others."""
        self._held = dict(masks)

    def watch(self, optimizer: Optimizer) -> Optimizer:
        """Hooks the guard to the steps of an optimiser; ``before_step`` is left to whoever calls them."""
        optimizer.register_step_post_hook(self._settle)
        return optimizer

    def before_step(self, optimizer: Optimizer) -> None:
        """Sets a gradient that is not finite to zero, and remembers on the device that it was not.

        A search without gradients judges by itself what it evaluates.
        """
        parameters = _parameters(optimizer)
        given = [p for p in parameters if p.grad is not None]
        gradients = [p.grad for p in given if p.grad is not None]
        # the gradients are those of all processes; a loss that is not finite has made them so
        finite = [torch.isfinite(gradient).all() for gradient in gradients]
        bad = ~torch.stack(finite).all() if finite else torch.zeros((), dtype=torch.bool, device=parameters[0].device)
        bad = bad if self._bad is None else self._bad | bad
        self._bad = self._flag = bad
        if bad.is_cuda:
            self._flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(bad, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._before[optimizer] = [p.detach().clone() for p in parameters]
        for parameter, gradient in zip(given, gradients, strict=True):
            gradient.copy_(torch.where(self._still(parameter, bad), 0.0, gradient))

    def _settle(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Projects the coefficients after a step, and undoes the step if its gradient was not finite."""
        with torch.no_grad():
            self.project()
            for parameter, before in zip(_parameters(optimizer), self._before.pop(optimizer), strict=True):
                parameter.copy_(torch.where(self._still(parameter, self._bad), before, parameter))  # type: ignore[arg-type]

    def _still(self, parameter: nn.Parameter, bad: Tensor) -> Tensor:
        """Returns which elements of a parameter do not move in this step."""
        held = self._held.get(parameter)
        return bad if held is None else bad | held

    def poll(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Stops the fit if the last step was bad; on a GPU if the one before it was, for which the host hardly waits.

        So all processes stop at the same step, however far each of them has come.

        Raises:
            DivergedError: a loss or gradient was not finite.
        """
        last = _Step(step, losses, self._flag, self._copied)
        if last.copied is None:
            _stop_if_bad(last)
            return
        earlier, self._earlier = self._earlier, last
        if earlier is not None:
            _stop_if_bad(earlier)

    def wait(self, step: int, losses: Mapping[str, Tensor]) -> None:
        """Stops the fit if the last step was bad, and waits to know it: after the last step no other one will tell.

        Raises:
            DivergedError: a loss or gradient was not finite.
        """
        for known in (self._earlier, _Step(step, losses, self._flag, self._copied)):
            if known is not None:
                _stop_if_bad(known)


def _stop_if_bad(step: _Step) -> None:
    if step.copied is not None:
        step.copied.synchronize()
    if step.bad is None or not bool(step.bad):
        return
    losses = {task: float(loss) for task, loss in step.losses.items()}
    guilty = [task for task, loss in losses.items() if not torch.isfinite(torch.tensor(loss))]
    raise DivergedError(
        f"step {step.number}: the {'loss' if guilty else 'gradient'} is not finite"
        + (f" for task '{guilty[0]}'" if guilty else ""),
        expected="finite numbers",
        got=f"losses {losses}",
        todo="lower model.search.lr, or look at the samples of that step, which changed nothing that is kept",
    )


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
