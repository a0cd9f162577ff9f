"""Contenders side by side: what fastmlp/benchmark/timing.py measures, and their speed relative to one another.

The processor's peak takes part as if it were a contender.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles

import torch

from benchmarks.check import verify
from benchmarks.check_training import verify_training
from benchmarks.contenders import YARDSTICK, Contender, Refused, contenders, trainers
from benchmarks.machine import describe, multiply_adds
from benchmarks.workloads import Work, Workload
from fastmlp.benchmark.machine import dtype_name
from fastmlp.benchmark.timing import Call, Effort, race, ratio

PEAK = "peak"

#: The fixture of benchmarks/conftest.py: checks a contender's results, then times it.
Measure = Callable[[Workload, type[Contender]], None]


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
