"""What is said of batches is a ratio of epochs that were checked, and wrong batches have none."""

from typing import Any

import pytest
import torch

import fastmlp
from benchmarks import data
from fastmlp.benchmark.timing import Effort

EFFORT = Effort(rounds=2, patience=0)


def test_outcomes_are_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "ROWS", (70,))
    times = {data.BATCHES: [1.0, 2.0], data.LOADER: [30.0, 50.0], data.STEPS: [10.0, 10.0], data.EPOCHS: [12.0, 12.0]}
    monkeypatch.setattr(data, "race", lambda calls, effort: {name: times[name] for name in calls})
    faster, longer = data.data(EFFORT)
    assert (faster.measured, faster.met, longer.measured, longer.met) == ("27.5", True, "1.20", False)


def test_all_of_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "ROWS", (70,))
    outcomes = list(data.data(EFFORT))
    assert [outcome.id for outcome in outcomes] == ["C9", "C9"]
    assert all(float(outcome.measured) > 0 for outcome in outcomes)


def test_wrong_batches_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastmlp.batches

    def wrong(*tensors: torch.Tensor, **options: Any) -> Any:
        return right(*tensors, **(options | {"shuffle": False}))

    monkeypatch.setattr(fastmlp, "batches", wrong)
    with pytest.raises(AssertionError, match="differ from those of a DataLoader"):
        next(data.data(EFFORT))
