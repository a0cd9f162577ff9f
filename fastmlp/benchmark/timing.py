"""Contenders interleaved in one process.

A tool that runs one contender after the other says, on a machine that others use too, what changed between them, which
may be the machine. Here each round takes one sample of every contender, in rotating order, so that they share the
machine's moods, and ratios are taken within a round. A sample during which another process had the core is taken again,
whatever its time.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import Any, TypeAlias

__all__ = ["AWAKE", "Call", "Effort", "race", "ratio", "spread"]

#: Seconds that a sample lasts at least.
SAMPLE = 1e-3

#: Seconds to warm up before it is found how many calls make a sample.
WARM_UP = 20e-3

#: Seconds of a call beside which it does not count what is in the caches when it begins.
COLD = 50e-3

#: How often a sample is taken, until the process ran for `AWAKE` of it.
TRIES = 4
AWAKE = 0.98

Call: TypeAlias = Callable[[], Any]


@dataclass(frozen=True)
class Effort:
    """How much time measuring may take.

    Attributes:
        rounds: at most.
        patience: seconds for a workload, after which `fewest` rounds are enough.
        fewest: rounds after which time counts.
    """

    rounds: int = 31
    patience: float = 5.0
    fewest: int = 5


def ratio(others: Sequence[float], own: Sequence[float]) -> float:
    """Return the median over the rounds of another contender's time divided by one's own."""
    return median(other / time for other, time in zip(others, own, strict=True))


def race(calls: Mapping[str, Call], effort: Effort) -> dict[str, list[float]]:
    """Return the seconds that a call took in each round, by contender."""
    loops, slow = {}, {}
    for name, call in calls.items():
        loops[name], seconds = _loops(call)
        slow[name] = seconds > COLD
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    end = perf_counter() + effort.patience
    with _no_garbage_collection():
        for i in range(effort.rounds):
            if i >= effort.fewest and perf_counter() > end:
                break
            first = i % len(names)
            for name in names[first:] + names[:first]:
                if not slow[name]:
                    calls[name]()  # so that the caches hold what is its own
                samples[name].append(_sample(calls[name], loops[name]))
    return samples


def _loops(call: Call) -> tuple[int, float]:
    """Warm up, and find how many calls make a sample and how many seconds they take."""
    end = perf_counter() + WARM_UP
    call()
    while perf_counter() < end:
        call()
    loops = 1
    while (seconds := _time(call, loops)) < SAMPLE:
        loops *= 2
    return loops, seconds


def _sample(call: Call, loops: int) -> float:
    """Return the seconds of a call, from a sample during which the process was not kept from running if possible."""
    for _ in range(TRIES):
        before = process_time()
        seconds = _time(call, loops)
        if process_time() - before > AWAKE * seconds:
            break
    return seconds / loops


def _time(call: Call, loops: int) -> float:
    start = perf_counter()
    for _ in range(loops):
        call()
    return perf_counter() - start


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def spread(times: Sequence[float]) -> float:
    """How far apart the quartiles of some times are, as a part of their median.

    Example:
        >>> spread([1.0, 1.0, 1.0, 1.0]), spread([1.0, 2.0, 3.0, 4.0, 5.0])
        (0.0, 0.6666666666666666)
    """
    if len(times) < 2:
        return 0.0
    low, middle, high = quantiles(times, n=4, method="inclusive")
    return (high - low) / middle
