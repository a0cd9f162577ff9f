"""Layers and networks of random shapes, so that no table decides what is fast.

Rows, columns and depth of a layer's product are log-uniform from 1 to 4096; dtype, layouts and activation
are drawn too. Networks have one to five layers, ReLU between them, and widths that are log-uniform from 1
to 1024. A draw of more than `MOST` multiplications is drawn again, for float16 at fewer: eager needs up to
2 ns for one of those. Every case is checked, then timed against eager, round by round. Those found slower
than `FLOOR` are timed again, longer, and the second time counts.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import quantiles

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fastmlp
from benchmarks.machine import describe
from benchmarks.plots import histogram
from benchmarks.random_cases import MOST, Drawn, Result
from benchmarks.random_layers import LARGEST, draw
from benchmarks.random_nets import draw_nets
from benchmarks.tables import console
from benchmarks.targets import Outcome
from fastmlp.benchmark.machine import dtype_name
from fastmlp.benchmark.timing import Effort

#: Its id among the targets.
RANDOM = "random"

#: In which the distribution is shown, by rows.
CLASSES = ((1, 8), (9, 64), (65, 512), (513, LARGEST))

#: The speed relative to eager below which a case needs a reason.
FLOOR = 0.95

FIRST, SECOND = Effort(rounds=15, patience=0.5), Effort(rounds=101, patience=4.0)


def run(cases: Sequence[Drawn], what: str, threads: int, out: Console, folder: Path) -> Outcome:
    """Check and time cases, the slow ones twice, and say whether one is slower than it may be.

    Prints the distribution of the speed, and the slow cases; writes all of them, and a histogram.

    Args:
        cases: what to compute, with the instruction set that is active.
        what: they are, such as "random shapes".
        threads: of both contenders.
        out: where to print.
        folder: where to write.
    """
    machine, isa = describe(threads), fastmlp.get_isa()
    results = []
    for case in track(cases, description=what, console=out, transient=True):
        subject = case.prepare()
        try:
            subject.verify()
        except AssertionError as error:
            out.print(f"[red]wrong:[/] {error}")
            continue
        result = subject.time(FIRST)
        results.append(subject.time(SECOND) if result.speedup < FLOOR else result)

    out.print(_distribution(results, f"{what}, kernels of {isa}: {machine}"))
    slow = sorted((result for result in results if result.speedup < FLOOR), key=lambda result: result.speedup)
    if slow:
        out.print(_slow(slow))
    speedups: dict[str, list[float]] = {}
    for result in results:
        speedups.setdefault(result.case.dtype, []).append(result.speedup)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{what.replace(' ', '_')}_{isa}"
    histogram(speedups, folder / f"{name}.png")
    text = json.dumps([asdict(result) for result in results], indent=2)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")

    worst = min(results, key=lambda result: result.speedup)
    met = len(results) - len(slow)
    measured = f"{worst.speedup:.2f}, {met} of {len(cases)} met"
    if wrong := len(cases) - len(results):
        measured += f", {wrong} wrong"
    if outside := sum(result.obstacle is not None for result in slow):
        measured += f", {outside} not in our kernels"
    goal = f">= {FLOOR:.2f} x eager"
    return Outcome(RANDOM, f"{what}, {isa}", goal, measured, met == len(cases), str(worst.case))


def every_way(
    layers: Sequence[Drawn], nets: Sequence[Drawn], threads: int, out: Console, folder: Path
) -> Iterator[Outcome]:
    """Run layers and networks with the kernels of each instruction set that users may meet.

    Those are the one that is active and, on a processor with AVX-512, AVX2's too, so that whoever works on
    such a machine sees both.

    Args:
        layers: from `draw`.
        nets: from `draw_nets`.
        threads: of both contenders.
        out: where to print.
        folder: where to write.
    """
    active = fastmlp.get_isa()
    for isa in dict.fromkeys((active, "avx2") if active.startswith("avx512") else (active,)):
        with _forced(isa):
            for cases, what in ((layers, "random shapes"), (nets, "random networks")):
                if cases:
                    yield run(cases, what, threads, out, folder)


@contextmanager
def _forced(isa: str) -> Iterator[None]:
    active = fastmlp.get_isa()
    fastmlp.set_isa(isa)
    try:
        yield
    finally:
        fastmlp.set_isa(active)


def _distribution(results: Sequence[Result], title: str) -> Table:
    table = Table("cases", title=title, caption="x eager; M: rows of the input")
    for name in ("number", "least", "5 %", "25 %", "median", "75 %", "95 %", "most", f"< {FLOOR}", "< 1"):
        table.add_column(name, justify="right")
    groups: dict[str, Callable[[Drawn], bool]] = {"all": lambda case: True}
    groups |= {dtype_name(dtype): partial(_has_dtype, dtype_name(dtype)) for dtype in MOST}
    groups |= {f"M {low} to {high}": partial(_has_rows, low, high) for low, high in CLASSES}
    groups |= {"infer": lambda case: not case.backward, "forward_backward": lambda case: case.backward}
    for name, holds in groups.items():
        found = sorted(result.speedup for result in results if holds(result.case))
        if len(found) > 1:
            cuts = quantiles(found, n=20, method="inclusive")
            shown = (found[0], cuts[0], cuts[4], cuts[9], cuts[14], cuts[18], found[-1])
            below = (sum(speedup < limit for speedup in found) for limit in (FLOOR, 1))
            table.add_row(name, str(len(found)), *(f"{value:.2f}" for value in shown), *map(str, below))
    return table


def _has_dtype(dtype: str, case: Drawn) -> bool:
    return case.dtype == dtype


def _has_rows(low: int, high: int, case: Drawn) -> bool:
    return low <= case.rows <= high


def _slow(results: Sequence[Result]) -> Table:
    table = Table("M x N x K, dtype, input/weight, activation, task", title=f"below {FLOOR} x eager, timed twice")
    table.add_column("x eager (quartiles)", justify="right")
    table.add_column("eager, us", justify="right")
    table.add_column("not in our kernels, since")
    for result in results:
        speedup = f"[red]{result.speedup:.2f}[/] ({result.low:.2f}-{result.high:.2f})"
        table.add_row(str(result.case), speedup, f"{result.eager_us:.1f}", result.obstacle or "")
    return table


def main() -> None:
    """Draw, measure and report what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_shapes", description=__doc__)
    parser.add_argument("--count", type=int, default=200, metavar="N", help="of layers (200)")
    parser.add_argument("--nets", type=int, default=60, metavar="N", help="of networks (60)")
    parser.add_argument("--dtype", choices=[dtype_name(dtype) for dtype in MOST], help="of all cases (each its own)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random numbers (0)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of PyTorch and fastmlp (1)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), metavar="FOLDER", help="for files (out/bench)")
    options = parser.parse_args()

    out = console()
    dtypes = [getattr(torch, options.dtype)] if options.dtype else list(MOST)
    layers, nets = (
        list(make(n, options.seed, dtypes)) for make, n in ((draw, options.count), (draw_nets, options.nets))
    )
    for outcome in every_way(layers, nets, options.threads, out, options.out):
        out.print(f"{outcome.what}, {outcome.goal}: {outcome.measured}")


if __name__ == "__main__":
    main()
