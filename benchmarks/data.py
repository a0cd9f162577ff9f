"""What batches cost, C9: beside a DataLoader's, and as a part of an epoch of `TrainStep`."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastmlp
from benchmarks.machine import describe
from benchmarks.targets import Outcome
from fastmlp.benchmark.timing import Effort, race, ratio

#: Of the tutorial's data: the rows that it trains with, and some thousand.
ROWS = (800, 4000)
FEATURES, HIDDEN, BATCH = 10, 50, 32

#: About as many steps make a sample, with batches and without, so that both are as likely to be interrupted.
STEPS_OF_A_CALL = 250

BATCHES, LOADER, STEPS, EPOCHS = "batches", "DataLoader", "steps alone", "epochs"


def data(effort: Effort) -> Iterator[Outcome]:
    """Time an epoch of batches against one of a DataLoader, and one of steps with batches against one without, C9.

    The steps alone go over batches that lie ready, in a loop of Python that keeps no loss.

    Args:
        effort: how long to try.

    Raises:
        AssertionError: if the batches are not the loader's.
    """
    describe(1)
    for rows in ROWS:
        samples = race(_epochs(rows), effort)
        where = f"tutorial, {rows} rows, batch {BATCH}"
        faster = ratio(samples[LOADER], samples[BATCHES])
        yield Outcome("C9", "batches, shuffled", ">= 20 x DataLoader", f"{faster:.1f}", faster >= 20, where)
        longer = ratio(samples[EPOCHS], samples[STEPS])
        what = f"an epoch of TrainStep by `epochs`, {_epochs_of_a_call(rows)} a call"
        yield Outcome("C9", what, "<= 1.15 x the steps' time", f"{longer:.2f}", longer <= 1.15, where)


def _epochs(rows: int) -> dict[str, Any]:
    """An epoch of each kind, as a call."""
    torch.manual_seed(0)
    inputs = torch.randn(rows, FEATURES)
    targets = inputs.sum(1, keepdim=True)
    batches = fastmlp.batches(inputs, targets, batch_size=BATCH, shuffle=True)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=BATCH, shuffle=True)
    ours, theirs = _drawn(batches), _drawn(loader)
    if len(ours) != len(theirs) or not all(map(torch.equal, ours, theirs)):
        raise AssertionError(f"batches of {rows} rows differ from those of a DataLoader")
    model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
    step = fastmlp.TrainStep(model, nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.01))
    ready = [(input.clone(), target.clone()) for input, target in batches]
    times = _epochs_of_a_call(rows)
    train = partial(fastmlp.epochs, step, inputs, targets, epochs=times)
    return {
        BATCHES: partial(_exhaust, batches),
        LOADER: partial(_exhaust, loader),
        STEPS: partial(_step_through, step, ready, times),
        EPOCHS: partial(train, batch_size=BATCH, shuffle=True),
    }


def _drawn(data: Iterable[Iterable[Tensor]]) -> list[Tensor]:
    torch.manual_seed(1)
    return [tensor for batch in data for tensor in batch]


def _exhaust(data: Iterable[Any]) -> None:
    for _ in data:
        pass


def _epochs_of_a_call(rows: int) -> int:
    return max(1, STEPS_OF_A_CALL * BATCH // rows)


def _step_through(step: fastmlp.TrainStep, ready: Iterable[tuple[Tensor, Tensor]], times: int) -> None:
    for _ in range(times):
        for input, target in ready:
            step(input, target)
