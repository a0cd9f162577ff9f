"""A part of the generated attack that takes two minutes, and whether the attack would find what it is there for.

`make attack` plays 20,000 cases. A failure begins with the line that plays it again.
"""

import io
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmlp
from tests.attack.cases import Case, Disagreement, play
from tests.attack.fake import Fake, a_number_drawn
from tests.attack.runner import Totals, Worker, attack, main
from tests.attack.surfaces import SURFACES, run
from tests.support.training import OPTIMIZERS

SECONDS = 115.0
#: So many of each surface are played on the slowest of machines; some hundreds on others.
LEAST = 40
#: In so many of the cases something is computed that agrees; in the others all is refused, or PyTorch raises too.
SHARES = {"plain": 0.9, "frozen": 0.8, "steps": 0.7, "programs": 0.3, "optim": 0.9, "threads": 0.9, "capture": 0.8}


@pytest.fixture(scope="module")
def totals() -> Totals:
    """The first cases of each surface, as many as the time allows."""
    return attack(list(SURFACES), 20_000, SECONDS, os.cpu_count() or 1, 0, io.StringIO())


@pytest.mark.parametrize("surface", SURFACES)
def test_attack(totals: Totals, surface: str) -> None:
    failures = [failure.failure for failure in totals.failures if failure.surface == surface]
    assert not failures, f"{len(failures)} of {totals.cases[surface]} cases:\n" + "\n\n".join(failures[:5])
    assert totals.cases[surface] >= LEAST
    assert totals.agreeing[surface] >= SHARES[surface] * totals.cases[surface]


@pytest.mark.parametrize("surface", [surface for surface in SURFACES if surface != "threads"])
def test_a_case_is_a_function_of_its_seed(surface: str) -> None:
    first, again = run(surface, 3), run(surface, 3)
    assert (first.outcomes, first.actions) == (again.outcomes, again.actions)


def test_a_failure_begins_with_its_replay(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(case: Case) -> None:
        case.act("call", "of nothing")
        raise Disagreement("one is two")

    monkeypatch.setitem(SURFACES, "plain", fails)
    assert main(["--surface", "plain", "--seed", "7"]) == 1
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "python -m tests.attack --surface plain --seed 7"
    assert rest[-2:] == ["    call: of nothing", "  Disagreement: one is two"]


def test_a_process_that_dies_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, int]] = []
    send = Worker.play

    def killed(self: Worker, case: tuple[str, int]) -> None:
        told.append(case)
        if len(told) == 2:
            self.process.kill()
            self.process.join()
            self.playing = case
        else:
            send(self, case)

    monkeypatch.setattr(Worker, "play", killed)
    totals = attack(["plain"], 3, 600, 1, 0, io.StringIO())
    assert totals.cases["plain"] == 3
    (failure,) = totals.failures
    assert failure.failure == "python -m tests.attack --surface plain --seed 1\n  the process died: exit code -9"


def test_settings_are_restored() -> None:
    before = fastmlp.get_isa(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    for seed in range(5):
        play("plain", lambda case: None, seed)
    assert (fastmlp.get_isa(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before


# Faults that are planted.


def a_little_off(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def off(*args: Any, **kwargs: Any) -> Tensor:
        result = function(*args, **kwargs)
        return result * (1 + 1e-2) if isinstance(result, Tensor) else result

    return off


def plant_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastmlp.functional, "mlp", a_little_off(fastmlp.functional.mlp))


def plant_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that never change."""
    monkeypatch.setattr(fastmlp.FrozenMLP, "_reload", lambda self, watch: None)


def plant_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of another scale."""
    monkeypatch.setattr(fastmlp.TrainStep, "__call__", a_little_off(fastmlp.TrainStep.__call__))


def plant_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    convert = fastmlp.convert

    def draws(*args: Any, **kwargs: Any) -> Any:
        torch.rand(1)
        return convert(*args, **kwargs)

    monkeypatch.setattr(fastmlp, "convert", draws)


def plant_optim(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPTIMIZERS:
        kind = getattr(fastmlp.optim, name)
        monkeypatch.setattr(kind, "step", steps_further(kind.step))


def steps_further(step: Callable[..., Any]) -> Callable[..., Any]:
    def steps(self: torch.optim.Optimizer, *args: Any) -> Any:
        result = step(self, *args)
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1.01)
        return result

    steps.hooked = True  # type: ignore[attr-defined]
    return steps


def plant_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastmlp, "capture", lambda function, **options: Fake(function, a_number_drawn))


PLANTS = {
    "plain": plant_plain,
    "frozen": plant_frozen,
    "steps": plant_steps,
    "programs": plant_programs,
    "optim": plant_optim,
    "capture": plant_capture,
}


@pytest.fixture
def planted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    PLANTS[name](monkeypatch)
    return name


@pytest.mark.parametrize("planted", PLANTS, indirect=True)
def test_planted_faults_are_found(planted: str) -> None:
    assert any(run(planted, seed).failure for seed in range(60))
