"""The account: what a line takes is found in that line, and parts add up to the total."""

import time
from pathlib import Path

import pytest

from benchmarks import account
from benchmarks.account import LINES, REST, STEP, STEPS, Clocked, take_apart
from benchmarks.contenders.pytorch import Fastmlp
from benchmarks.targets import find
from fastmlp.benchmark.timing import Effort

WAIT = 2e-3


@pytest.mark.parametrize("line", LINES)
def test_what_a_line_takes_is_found_in_that_line(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (workload,) = find(["tutorial b32 step sgd"])
    contender = Fastmlp(workload)
    owners = {"zero_grad": contender.optimizer, "forward": contender.model, "loss": contender.loss}
    owner = owners.get(line, contender.optimizer)
    name = {"zero_grad": "zero_grad", "optimizer": "step"}.get(line, "forward")
    if line == "backward":
        next(contender.model.parameters()).register_hook(lambda grad: time.sleep(WAIT))
    else:
        right = getattr(owner, name)

        def slow(*args: object) -> object:
            time.sleep(WAIT)
            return right(*args)

        monkeypatch.setattr(owner, name, slow)
    clocked = Clocked(contender)
    for _ in range(3):
        clocked()
    assert len(clocked.means) + len(clocked.disturbed) == 3
    found = clocked.lines()
    assert list(found) == list(LINES)
    assert [name for name, seconds in found.items() if seconds >= WAIT] == [line]


def test_parts_add_up() -> None:
    (workload,) = find(["tutorial b32 step adam"])
    accounts, parts = take_apart(workload, Effort(rounds=2, patience=0))
    assert [found.way for found in accounts] == [*account.LOOPS, STEP]
    for found in accounts:
        assert sum(found.parts.values()) == pytest.approx(found.total)
        assert set(found.parts) <= {*LINES, REST}
    assert [part.name for part in parts][-1] == "call"
    assert all(part.how for part in parts)


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["account", "tutorial b32 step sgd", "--rounds", "2", "--out", str(tmp_path)])
    account.main()
    assert (tmp_path / "account.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "account.json").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert f"means of {STEPS} steps" in printed
    assert "how it was measured" in printed


@pytest.mark.parametrize("workload", ["wide b1 infer", "no such workload"])
def test_only_steps_are_taken_apart(
    workload: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["account", workload])
    with pytest.raises(SystemExit):
        account.main()
    assert workload in capsys.readouterr().err
