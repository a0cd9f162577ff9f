"""Contenders side by side: interleaved in one process, with their speed relative to one another.

pytest-benchmark runs one contender after the other; on a machine that others use too, what changed
between them may be the machine. Here each round takes one sample of every contender, in rotating
order, so that they share the machine's moods, and ratios are taken within a round. The processor's
peak takes part as if it were a contender. A sample during which another process had the core is taken
again, whatever its time.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import Any

import torch

from benchmarks.check import verify
from benchmarks.check_training import verify_training
from benchmarks.contenders import YARDSTICK, Contender, Refused, contenders, trainers
from benchmarks.machine import describe, dtype_name, multiply_adds
from benchmarks.workloads import Work, Workload

#: Seconds that a sample lasts at least.
SAMPLE = 1e-3

#: Seconds to warm up before it is found how many calls make a sample.
WARM_UP = 20e-3

#: Seconds of a call beside which it does not count what is in the caches when it begins.
COLD = 50e-3

#: How often a sample is taken, until the process ran for `AWAKE` of it.
TRIES = 4
AWAKE = 0.98

PEAK = "peak"

Call = Callable[[], Any]

#: The fixture of benchmarks/conftest.py: checks a contender's results, then times it.
Measure = Callable[[Workload, type[Contender]], None]


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


@dataclass(frozen=True)
class Row:
    """One contender on one workload.

    Attributes:
        suite: the workload's.
        workload: its name.
        dtype: the workload's.
        contender: its name.
        seconds: median time of a call.
        gflops: the workload's operations divided by that time, in 1e9 per second.
        intensity: the workload's operations for each byte that has to be read or written.
        share: median over the rounds of its rate divided by the peak of the cores that it may use.
        speedup: median over the rounds of eager's time divided by this contender's.
        low: first quartile of the same.
        high: third quartile of the same.
        ratios: median over the rounds of another contender's time divided by this one's, by the other.
    """

    suite: str
    workload: str
    dtype: str
    contender: str
    seconds: float
    gflops: float
    intensity: float
    share: float
    speedup: float
    low: float
    high: float
    ratios: dict[str, float]


@dataclass(frozen=True)
class Refusal:
    """One contender that cannot run a workload.

    Attributes:
        suite: the workload's.
        workload: its name.
        contender: its name.
        reason: in words.
    """

    suite: str
    workload: str
    contender: str
    reason: str


def measure(workload: Work, threads: int, effort: Effort) -> tuple[list[Row], list[Refusal]]:
    """Check all contenders on a workload, then time those that can run it.

    Args:
        workload: what to compute.
        threads: of each contender.
        effort: how long to try.

    Raises:
        AssertionError: if a result is wrong.
    """
    describe(threads)
    calls, refusals = _checked(workload)
    work = multiply_adds(workload.dtype)
    samples = race(calls | {PEAK: work}, effort)
    peak = [work() / seconds for seconds in samples.pop(PEAK)]
    rows = []
    for name, times in samples.items():
        ratios = {other: ratio(samples[other], times) for other in samples if other != name}
        low, speedup, high = quantiles(
            [eager / own for eager, own in zip(samples[YARDSTICK], times, strict=True)], n=4, method="inclusive"
        )
        seconds = median(times)
        share = ratio([workload.flops / most / threads for most in peak], times)
        gflops, intensity = workload.flops / seconds / 1e9, workload.flops / workload.bytes
        own = (workload.suite, workload.name, dtype_name(workload.dtype), name)
        rows.append(Row(*own, seconds, gflops, intensity, share, speedup, low, high, ratios))
    return rows, refusals


def _checked(workload: Work) -> tuple[dict[str, Call], list[Refusal]]:
    """Return the calls of all contenders whose results are right, and who cannot run the workload."""
    if isinstance(workload, Workload):
        kinds = contenders(workload)
        for kind in kinds:
            verify(kind(workload))
        return {kind.name: kind(workload).call for kind in kinds}, []
    calls, refusals = {}, []
    torch.compiler.reset()  # so that one program's graphs are not looked through for the next one
    for trainer in trainers(workload):
        # Checked and timed is the same one, because it may have taken a minute to compile.
        made = trainer(workload)
        try:
            verify_training(made)
        except Refused as error:
            refusals.append(Refusal(workload.suite, workload.name, trainer.name, str(error)))
        else:
            calls[trainer.name] = made.call
    return calls, refusals


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
