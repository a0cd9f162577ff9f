"""Gradients that are there before a call, or outlive it: optimizers that step before `zero_grad`, frozen parameters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmlp

CALLS = 12

#: Makes parameters, an optimizer of them, and what is called in turn.
Program = Callable[[], tuple[list[nn.Parameter], list[Callable[[Tensor], Any]]]]


def parameters(n: int = 2) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(3)) for _ in range(n)]


def sgd(of: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(of, lr=0.5, momentum=0.5)


def step_first() -> Any:
    (w,) = of = parameters(1)
    optimizer = sgd(of)

    def step(x: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()
        (w * x).sum().backward()

    return of, [step]


def step_alone() -> Any:
    (w,) = of = parameters(1)
    optimizer = sgd(of)

    def step(x: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    def backward(x: Tensor) -> None:
        (w * x).sum().backward()

    return of, [backward, backward, step]


def two_parts() -> Any:
    a, b = of = parameters()
    optimizer = sgd(of)

    def first(x: Tensor) -> None:
        (a * x).sum().backward()

    def second(x: Tensor) -> None:
        (b * x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return of, [first, second]


def cleared_by_hand() -> Any:
    (w,) = of = parameters(1)
    optimizer = sgd(of)

    def step(x: Tensor) -> None:
        optimizer.step()
        w.grad = None
        (w * x).sum().backward()

    return of, [step]


def two_optimizers() -> Any:
    a, b = of = parameters()
    optimizers = [sgd([a]), torch.optim.Adam([b], lr=0.1)]

    def step(x: Tensor) -> None:
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        (a * b * x + a - b).sum().backward()

    return of, [step]


def zeroed() -> Any:
    (w,) = of = parameters(1)
    optimizer = sgd(of)

    def step(x: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        (w * x).sum().backward()

    return of, [step]


def frozen_at_times() -> Any:
    a, b = of = parameters()
    optimizer, calls = sgd(of), iter(range(CALLS))

    def step(x: Tensor) -> None:
        optimizer.zero_grad()
        ((a + b) * x).sum().backward()
        optimizer.step()

    def freeze(x: Tensor) -> None:
        a.requires_grad_(next(calls) // 2 % 2 == 1)

    return of, [freeze, step]


PROGRAMS = [step_first, step_alone, two_parts, cleared_by_hand, two_optimizers, zeroed, frozen_at_times]


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("make", PROGRAMS, ids=lambda make: make.__name__)
def test_gradients_from_before_a_call(make: Program, fuse: bool) -> None:
    def run(capture: bool) -> list[list[Tensor | None]]:
        of, functions = make()
        known: dict[Any, Any] = {
            f: f if f.__name__ == "freeze" or not capture else fastmlp.capture(f, fuse=fuse) for f in functions
        }
        found = []
        for i in range(CALLS):
            for function in functions:
                known[function](torch.tensor([1.0, 2.0, 0.5]) * (i + 1))
                now: list[Tensor | None] = [p.detach().clone() for p in of]
                found.append(now + [None if p.grad is None else p.grad.clone() for p in of])
        if capture:
            assert all(one.replays > 2 for one in known.values() if isinstance(one, fastmlp.Captured))
        return found

    for now, expected in zip(run(True), run(False), strict=True):
        for x, y in zip(now, expected, strict=True):
            assert (x is None) == (y is None)
            # Numbers of few bits: SGD's steps are exact, Adam's equal within the rounding of a few operations.
            assert x is None or y is None or (x - y).abs().max() <= 8 * torch.finfo(x.dtype).eps * y.abs().max()
