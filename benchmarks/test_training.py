"""How programs are timed: wrong steps are found, refusals are told, targets judged as they say."""

import io
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import capture_targets, timing
from benchmarks.capture_targets import CAPTURE_CLAIMS, Mean
from benchmarks.check_training import CALLS, check_losses, reference, verify_training
from benchmarks.contenders import NAMES, OWN, TRAINERS, Refused, Trainer, trainers
from benchmarks.contenders.training import Captured, CompiledStep, EagerFused, EagerTrainer, JaxTrainer
from benchmarks.machine import describe
from benchmarks.programs import PROGRAMS, SMALL, Program
from benchmarks.tables import tables
from benchmarks.targets import over
from benchmarks.timing import Row, measure
from benchmarks.workloads import SUITES, Tier, Training, trainings, works
from fastmlp.benchmark.timing import Effort
from fastmlp.tape.lower import lower

QUICK = Effort(rounds=3, patience=0, fewest=2)


def training(name: str = "tutorial sgd b32") -> Training:
    return Training(name, Tier.QUICK)


class OwnDraws(EagerTrainer):
    """Eager with other random numbers."""

    name = "own_draws"
    draws = False

    def losses(self, calls: int, seed: int = 0) -> Iterator[Tensor]:
        return super().losses(calls, seed + 100)


@pytest.mark.parametrize("name", ["ppo b64", "vae b128", "burgers b128", "batchnorm b128"])
def test_right_steps_are_right(name: str) -> None:
    verify_training(EagerFused(training(name)))
    verify_training(OwnDraws(training(name)))


def spoiling(change: Callable[[Program], None]) -> type[Trainer]:
    """Eager that does something to the program after each step."""

    class Spoiled(EagerTrainer):
        name = "spoiled"

        def prepare(self, program: Program) -> Callable[..., Any]:
            def step(*batch: Tensor) -> Tensor:
                loss = program.step(*batch)
                with torch.no_grad():
                    change(program)
                return loss

            return step

    return Spoiled


def less_of_one_parameter(program: Program) -> None:
    next(iter(program.parameters().values())).mul_(1 - 1e-3)


def not_a_number(program: Program) -> None:
    next(iter(program.parameters().values())).fill_(torch.nan)


def not_at_all(program: Program) -> None:
    """Take the step back."""
    fresh = PROGRAMS["vae b128"](seed=0).parameters()
    for name, parameter in program.parameters().items():
        parameter.copy_(fresh[name])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (less_of_one_parameter, "farther off than rounding explains"),
        (not_a_number, "the losses do not fall"),
        (not_at_all, "the losses do not fall|farther off"),
    ],
)
def test_wrong_steps_are_found(change: Callable[[Program], None], said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        verify_training(spoiling(change)(training("vae b128")))


def test_a_wrong_mean_is_found_where_random_numbers_are_others() -> None:
    losses = reference("vae b128").losses
    check_losses(losses, "vae b128", "right", exact=False)
    with pytest.raises(AssertionError, match="the losses' mean is"):
        check_losses(1.05 * losses, "vae b128", "wrong", exact=False)


def test_programs_are_timed_beside_each_other() -> None:
    rows, refusals = measure(training(), 1, QUICK)
    assert not refusals
    assert [row.contender for row in rows] == [kind.name for kind in trainers(training())]
    assert rows[0].speedup == 1
    for row in rows:
        assert (row.suite, row.workload) == ("programs", "tutorial sgd b32")
        assert row.seconds > 1e-6
        assert row.gflops > 0


class Refusing(EagerTrainer):
    """Runs nothing."""

    name = "compile_step"

    def losses(self, calls: int, seed: int = 0) -> Iterator[Tensor]:
        raise Refused("no [double] backward")


def test_a_table_says_why_a_contender_has_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "trainers", lambda training: [EagerTrainer, Refusing])
    rows, refusals = measure(training(), 1, QUICK)
    assert [row.contender for row in rows] == ["eager"]
    (table,) = tables(rows, describe(1), refusals)
    out = Console(file=io.StringIO(), width=200)
    out.print(table)
    assert isinstance(out.file, io.StringIO)
    words = " ".join(out.file.getvalue().split())  # a caption is no wider than its table
    assert "compile_step cannot run tutorial sgd b32: no [double] backward" in words


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_torch_compile_refuses_derivatives_of_derivatives() -> None:
    with pytest.raises(Refused, match="double backward"):
        verify_training(CompiledStep(training("hamiltonian b128")))


def test_names_are_those_of_all_contenders() -> None:
    assert {kind.name for kind in TRAINERS} <= set(NAMES)
    assert Captured.name in OWN
    assert NAMES[0] == EagerTrainer.name


def test_every_run_has_the_small_programs() -> None:
    assert [t.name for t in trainings(Tier.QUICK)] == list(SMALL)
    assert {t.name for t in trainings(Tier.DEFAULT)} == set(PROGRAMS)
    assert {work.suite for suite in SUITES for work in works(suite, Tier.QUICK)} == set(SUITES)
    assert all(work.flops > 0 and work.bytes > 0 for work in trainings(Tier.DEFAULT))


def test_torch_compile_takes_few_programs_in_a_quick_run() -> None:
    quick = [t.name for t in trainings(Tier.QUICK) if CompiledStep.takes(t)]
    assert quick == ["ppo b64", "vae b128"]
    assert all(CompiledStep.takes(t) for t in trainings(Tier.DEFAULT))
    full = [kind.name for kind in trainers(Training("dqn b128", Tier.FULL))]
    assert full[-2:] == ["compile_max", "compile_autograd"]


def row(workload: str, speedup: float, **ratios: float) -> Row:
    found = {"eager": speedup, **ratios}
    return Row("programs", workload, "float32", "capture", 1.0, 1.0, 1.0, 0.1, speedup, speedup, speedup, found)


def test_a_mean_is_the_geometric_one_of_all() -> None:
    claim = Mean("C0", "two", 4.0, "x eager", over("eager"), ("a", "b"), "capture")
    outcome = claim.outcome({"a": row("a", 2.0), "b": row("b", 8.0)})
    assert (outcome.met, outcome.measured) == (True, "4.00")
    outcome = claim.outcome({"a": row("a", 2.0), "b": row("b", 7.9)})
    assert (outcome.met, outcome.measured) == (False, "3.97")
    outcome = claim.outcome({"a": row("a", 2.0)})
    assert (outcome.met, outcome.measured) == (None, "not measured: 1 of 2 have a figure")


def test_the_best_of_torch_compile_is_what_counts() -> None:
    (claim,) = (claim for claim in CAPTURE_CLAIMS if claim.id == "C5")
    assert claim.value(row("ppo b64", 3.0, compile_step=2.0, compile_max=1.5, jax=0.5)) == 1.5
    assert claim.value(row("burgers b128", 3.0, jax=0.5)) is None
    assert {name for claim in CAPTURE_CLAIMS for name in claim.workloads} == set(PROGRAMS)


def test_a_captured_step_is_compared_with_train_step_on_equal_work() -> None:
    outcomes = list(capture_targets.beside_train_step(QUICK))
    assert [outcome.where for outcome in outcomes] == list(capture_targets.TUTORIAL)
    assert all(0 < float(outcome.measured) < 20 for outcome in outcomes)


def test_memory_is_what_the_allocator_gave_out() -> None:
    kept: list[Tensor] = []

    def call() -> None:
        big = torch.empty(1 << 20, dtype=torch.uint8)
        kept.append(torch.empty(1 << 16, dtype=torch.uint8))
        del big
        torch.empty(1 << 18, dtype=torch.uint8)

    assert capture_targets._allocated(call) == (1 << 20) + (1 << 16)


def test_the_time_of_recording_is_of_recorded_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    tapes = []

    def counted(*args: Any) -> Any:
        tapes.append(lower(*args))
        return tapes[-1]

    monkeypatch.setattr(import_module("fastmlp.capture"), "lower", counted)
    (outcome,) = capture_targets.recording(QUICK)
    assert len(tapes) > QUICK.fewest  # each sample makes a tape of its own
    assert float(outcome.measured.removesuffix(" ms")) > 0
    operations = int(outcome.where.removeprefix("burgers b128, ").removesuffix(" operations"))
    # Views are among them: of two layers' forward, two derivatives and backward there are hundreds.
    assert 300 < operations < 600


@pytest.mark.skipif(bool(JaxTrainer.missing()), reason="needs JAX and optax, which `make bench` installs")
@pytest.mark.parametrize("name", ["ppo b64", "sac critic b256", "vae b128", "burgers b128"])
def test_a_twin_in_jax_has_the_losses_of_its_program(name: str) -> None:
    """With the same random numbers, over so many steps that optimizers and averages count."""
    from benchmarks.jax_twins import array

    trainer, generator = JaxTrainer(training(name)), torch.Generator().manual_seed(0)
    shape, losses = trainer.twin.noise, []
    for i in range(CALLS):
        noise = array(torch.randn(shape, generator=generator)) if shape else None
        losses.append(float(trainer.twin.step_with(noise, *trainer.batch(i))))
    check_losses(torch.tensor(losses, dtype=torch.float64), name, f"{name} in JAX", exact=True)
