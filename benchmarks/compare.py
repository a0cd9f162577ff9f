"""Contenders side by side: interleaved in one process, with their speed relative to eager.

pytest-benchmark runs one contender after the other; on a machine that others use too, what changed
between them may be the machine. Here each round takes one sample of every contender, in rotating
order, so that they share the machine's moods, and ratios are taken within a round.
"""

import argparse
import gc
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, get_args

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.check import verify
from benchmarks.contenders import CONTENDERS, contenders
from benchmarks.machine import describe
from benchmarks.workloads import Suite, Tier, Workload, select

SAMPLE = 1e-3
"""Seconds that a sample lasts at least."""

PATIENCE = 5.0
"""Seconds for a workload, after which `FEWEST` rounds are enough."""

FEWEST = 5

Call = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One contender on one workload.

    Attributes:
        suite: the workload's.
        workload: its name.
        contender: its name.
        seconds: median time of a call.
        gflops: the workload's operations divided by that time, in 1e9 per second.
        speedup: median over the rounds of eager's time divided by this contender's.
        low: first quartile of the same.
        high: third quartile of the same.
    """

    suite: Suite
    workload: str
    contender: str
    seconds: float
    gflops: float
    speedup: float
    low: float
    high: float


def compare(workload: Workload, rounds: int) -> list[Row]:
    """Check all contenders on a workload, then time them.

    Args:
        workload: what to compute.
        rounds: how many at most, 2 or more.

    Raises:
        AssertionError: if a result is wrong.
    """
    kinds = contenders(workload.task)
    for kind in kinds:
        verify(kind(workload))
    samples = _race({kind.name: kind(workload).call for kind in kinds}, rounds)
    rows = []
    for name, times in samples.items():
        speedups = [eager / own for eager, own in zip(samples["eager"], times, strict=True)]
        low, speedup, high = quantiles(speedups, n=4, method="inclusive")
        seconds = median(times)
        gflops = workload.flops / seconds / 1e9
        rows.append(Row(workload.suite, workload.name, name, seconds, gflops, speedup, low, high))
    return rows


def _race(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Return the seconds that a call took in each round, by contender."""
    loops = {name: _loops(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    end = perf_counter() + PATIENCE
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            if i >= FEWEST and perf_counter() > end:
                break
            first = i % len(names)
            for name in names[first:] + names[:first]:
                calls[name]()  # so that the caches hold what is its own
                samples[name].append(_time(calls[name], loops[name]) / loops[name])
    finally:
        gc.enable()
    return samples


def _loops(call: Call) -> int:
    """Warm up, and find how many calls make a sample."""
    end = perf_counter() + 20 * SAMPLE
    call()
    while perf_counter() < end:
        call()
    loops = 1
    while _time(call, loops) < SAMPLE:
        loops *= 2
    return loops


def _time(call: Call, loops: int) -> float:
    start = perf_counter()
    for _ in range(loops):
        call()
    return perf_counter() - start


def _table(rows: list[Row], title: str, caption: str) -> Table:
    """Write a line for each workload, with columns for each contender."""
    table = Table("workload", title=title, caption=caption)
    names = [kind.name for kind in CONTENDERS if any(row.contender == kind.name for row in rows)]
    for name in names:
        table.add_column(f"{name}, us", justify="right")
        table.add_column("GFLOP/s", justify="right")
        if name != "eager":
            table.add_column("x eager (quartiles)", justify="right")
    for workload in dict.fromkeys(row.workload for row in rows):
        found = {row.contender: row for row in rows if row.workload == workload}
        cells = []
        for name in names:
            row = found.get(name)
            cells += [f"{row.seconds * 1e6:.1f}", f"{row.gflops:.1f}"] if row else ["", ""]
            if name != "eager":
                cells.append(_speedup(row) if row else "")
        table.add_row(workload, *cells)
    return table


def _speedup(row: Row) -> str:
    color = "green" if row.low > 1 else "red" if row.high < 1 else "yellow"
    return f"[{color}]{row.speedup:.2f}[/] ({row.low:.2f}-{row.high:.2f})"


def main() -> None:
    """Compare what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of PyTorch and fastmlp (1)")
    parser.add_argument("--suite", choices=get_args(Suite), help="one suite instead of all")
    parser.add_argument("--match", default="", metavar="REGEX", help="only workloads with it in their names")
    parser.add_argument("--rounds", type=int, default=31, metavar="N", help="at most, 2 or more (31)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="to write the rows to")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="tier", action="store_const", const=Tier.QUICK, help="fewer workloads")
    size.add_argument("--full", dest="tier", action="store_const", const=Tier.FULL, help="all workloads")
    parser.set_defaults(tier=Tier.DEFAULT)
    options = parser.parse_args()

    machine = describe(options.threads)
    console = Console()
    if not console.is_terminal:
        console.width = 400  # a file has no right edge
    rows: list[Row] = []
    for suite in [options.suite] if options.suite else get_args(Suite):
        workloads = [w for w in select(suite, options.tier) if re.search(options.match, w.name)]
        steps = track(workloads, description=suite, console=console, transient=True)
        found = [row for workload in steps for row in compare(workload, options.rounds)]
        if found:
            console.print(_table(found, f"{suite}: {machine}", f"best torch.mm: {machine.best_mm_gflops} GFLOP/s"))
        rows += found
    if options.json:
        report = {"machine": asdict(machine), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
