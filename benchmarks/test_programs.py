"""The programs: they train, twins of one seed are the same, and state() holds all that a step changes."""

import pytest
import torch
from torch import Tensor

from benchmarks.programs import BATCHES, PROGRAMS, SMALL, Program

EVERY = pytest.mark.parametrize("name", PROGRAMS)


def run(program: Program, calls: int) -> Tensor:
    """Trains, with random numbers from one seed, and returns the losses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return torch.stack([program.step(*program.inputs(i)) for i in range(calls)])


@EVERY
def test_the_loss_falls(name: str) -> None:
    """On the same batches, which come again."""
    losses = run(PROGRAMS[name](seed=0), 3 * BATCHES)
    assert losses.shape == (3 * BATCHES,)
    assert losses.isfinite().all()
    assert losses[-BATCHES:].mean() < losses[:BATCHES].mean()
    assert not losses.requires_grad


@EVERY
def test_a_step_changes_all_that_an_optimizer_holds(name: str) -> None:
    """All but what no loss depends on, as a constant that is added to an energy."""
    program = PROGRAMS[name](seed=0)
    held = [p for o in program.optimizers.values() for group in o.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in held]
    run(program, 2)
    assert [tuple(p.shape) for p in held if p.grad is None] == ([(1,)] if name == "hamiltonian b128" else [])
    for p, old in zip(held, before, strict=True):
        assert torch.equal(p, old) is (p.grad is None)


@EVERY
def test_twins_are_the_same(name: str) -> None:
    first, second = PROGRAMS[name](seed=3), PROGRAMS[name](seed=3)
    assert torch.equal(run(first, 4), run(second, 4))
    found, expected = first.state(), second.state()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


@EVERY
def test_another_seed_is_another_program(name: str) -> None:
    first, second = PROGRAMS[name](seed=0), PROGRAMS[name](seed=1)
    assert not torch.equal(run(first, 1), run(second, 1))


@EVERY
def test_random_says_whether_a_step_draws(name: str) -> None:
    program = PROGRAMS[name](seed=0)
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        program.step(*program.inputs(0))
        assert torch.equal(torch.get_rng_state(), before) is not program.random


@EVERY
def test_making_a_program_draws_nothing_from_outside(name: str) -> None:
    before = torch.get_rng_state()
    PROGRAMS[name](seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_inputs_come_again_as_new_tensors() -> None:
    program = PROGRAMS["ppo b64"](seed=0)
    first, again = program.inputs(1), program.inputs(1 + BATCHES)
    assert [len(tensor) for tensor in first] == [64] * 5
    for a, b, other in zip(first, again, program.inputs(2), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
        assert not torch.equal(a, other)


def test_state_holds_parameters_gradients_buffers_and_moments() -> None:
    program = PROGRAMS["batchnorm b128"](seed=0)
    run(program, 1)
    keys = set(program.state())
    wanted = {"model.0.weight", "model.0.weight.grad", "model.1.running_var", "model.1.num_batches_tracked"}
    assert wanted | {"optimizer.0.momentum_buffer"} <= keys


def test_parameters_beside_modules_have_the_name_of_their_optimizer() -> None:
    program = PROGRAMS["sac actor b256"](seed=0)
    names = list(program.parameters())
    assert names[-1] == "alpha_optimizer.0"
    assert not any(name.startswith("optimizer.") for name in names)
    assert len({id(p) for p in program.parameters().values()}) == len(names)


def test_options_reach_every_optimizer() -> None:
    for name in ("ppo b64", "sac actor b256", "dlrm b256", "tutorial sgd b32"):
        for optimizer in PROGRAMS[name](seed=0, fused=True).optimizers.values():
            assert all(group["fused"] for group in optimizer.param_groups)


def test_small_programs_are_programs() -> None:
    assert set(SMALL) <= set(PROGRAMS)
