"""Whole training steps of many kinds, captured and not: the same bits in all that they leave."""

import pytest
import torch
from torch import Tensor

import fastmlp
from benchmarks.programs import PROGRAMS, Program

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


@EVERY
def test_with_fusion_an_optimizer_of_torch_steps_as_ours(name: str) -> None:
    """From the first replay on: then an eager step with the class of `fastmlp.optim` has the same bits."""
    eager, twin = PROGRAMS[name](seed=0), PROGRAMS[name](seed=0)
    step = fastmlp.capture(twin.step)
    runs = Run(eager, eager.step), Run(twin, step)
    check_same(*runs, range(2))
    for optimizer in eager.optimizers.values():
        optimizer.__class__ = getattr(fastmlp.optim, type(optimizer).__name__, type(optimizer))
    check_same(*runs, range(2, 10))
    assert step.replays == 8
    (tape,) = step.report().tapes
    assert tape.optimizers == [
        (kind, "fastmlp" if hasattr(fastmlp.optim, kind) else "torch") for kind, _ in tape.optimizers
    ]
