"""Whole training steps of many kinds, captured and not: the same bits in all that they leave, or near with fusion."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmlp
from benchmarks.programs import PROGRAMS, Program
from tests.support.rounding import distance, rounding_bounds

CALLS = 50
EVERY = pytest.mark.parametrize("name", PROGRAMS)


class Run:
    """A program with a stream of random numbers of its own."""

    def __init__(self, program: Program, step: object) -> None:
        self.program = program
        self.step = step
        self.random = torch.Generator().manual_seed(1).get_state()

    def __call__(self, i: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.random)
            loss: Tensor = self.step(*self.program.inputs(i))  # type: ignore[operator]
            self.random = torch.get_rng_state()
        return loss

    def state(self) -> dict[str, Tensor]:
        return {**self.program.state(), "random": self.random}


def check_same(eager: Run, captured: Run, calls: range) -> None:
    for i in calls:
        assert torch.equal(eager(i), captured(i)), f"loss of call {i}"
        expected, found = eager.state(), captured.state()
        assert expected.keys() == found.keys()
        assert [key for key in expected if not torch.equal(expected[key], found[key])] == [], f"after call {i}"


@EVERY
def test_the_same_bits_without_fusion(name: str) -> None:
    eager, twin = PROGRAMS[name](seed=0), PROGRAMS[name](seed=0)
    step = fastmlp.capture(twin.step, fuse=False)
    check_same(Run(eager, eager.step), Run(twin, step), range(CALLS))
    assert step.replays == CALLS - 2


def results_of(name: str, capture: Callable[[Any], Any], calls: int) -> dict[str, Tensor]:
    """What a program leaves, and its losses."""
    program = PROGRAMS[name](seed=0)
    run = Run(program, capture(program.step))
    losses = {f"loss of call {i}": run(i) for i in range(calls)}
    return {**losses, **run.state()}


@EVERY
def test_with_fusion_results_are_as_near_as_rounding_lets_them_be(name: str) -> None:
    captures = []

    def capture(step: Any) -> Any:
        captures.append(fastmlp.capture(step))
        return captures[0]

    calls = 8
    found = results_of(name, capture, calls)
    expected = results_of(name, lambda step: step, calls)
    bounds = rounding_bounds(lambda: results_of(name, lambda step: step, calls), expected, steps=True)
    far = {key: (distance(found[key], expected[key]).item(), bound.item()) for key, bound in bounds.items()}
    assert {key: apart for key, apart in far.items() if not apart[0] <= apart[1]} == {}
    assert captures[0].replays == calls - 2
    (tape,) = captures[0].report().tapes
    assert tape.optimizers == [
        (kind, "fastmlp" if hasattr(fastmlp.optim, kind) else "torch") for kind, _ in tape.optimizers
    ]
