"""Programs against themselves converted, in a TrainStep, captured and frozen: what is taken, results, and times."""

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from statistics import geometric_mean, median
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from benchmarks.machine import describe
from benchmarks.tables import console
from fastmlp.benchmark.timing import Effort, race, ratio
from tests.support import ways
from tests.support.comparison import PARTS, Reference, plain_of
from tests.support.subjects import SUBJECTS, Maker, Subject, in_a_loop
from tests.support.ways import Fused

#: The program as it is, and what else does its step, in the order of the table's columns.
EAGER, IN_PLACE, TRACED, TRAIN_STEP, CAPTURED = "eager", "in place", "trace=True", "TrainStep", "captured"

#: Numbers of rows of requests.
ROWS = (1, 256)

CAPTION = """
linears: fused of all, and in how many operations; difference: the largest from the program as it is, of outputs, \
gradients and what ten steps leave, in float64, as a share of the most that rounding explains \
(tests/support/rounding.py); step: as it is, and x: that over the time converted, by TrainStep and captured, in \
float32, the median over rounds in turn; rows: inference as it is, and x: that over the time frozen"""

#: Steps that are compared, and runs for the bounds; tests/modules/test_programs.py compares 50 steps of small sizes.
STEPS, PROBES = 10, 2


@dataclass(frozen=True)
class Measured:
    """What was found out about a program.

    Attributes:
        name: of the program.
        parameters: numbers that it trains.
        linears: layers that it has.
        fused: those that run fused, by the way to convert it.
        why_not: by the way, why it was refused.
        difference: the largest, as a share of its bound.
        seconds: of a step as it is, and of inference with so many rows.
        speedups: over these, by the way, and by the rows of a frozen network.
    """

    name: str
    parameters: int
    linears: int
    fused: dict[str, Fused]
    why_not: dict[str, str]
    difference: float
    seconds: dict[str | int, float]
    speedups: dict[str | int, float]

    def cells(self) -> Iterator[str]:
        """Yield the cells of the program's line."""
        yield from (self.name, f"{self.parameters:,}")
        for way in (IN_PLACE, TRACED):
            found = self.fused.get(way)
            yield "no" if found is None else f"{found.layers}/{self.linears} in {found.runs}"
        yield from ("no" if way in self.why_not else "yes" for way in ("frozen", TRAIN_STEP, CAPTURED))
        yield f"{self.difference:.1%}" if self.difference <= 1 else f"[red]{self.difference:.1%}[/]"
        yield _microseconds(self.seconds.get(EAGER))
        yield from (_times(self.speedups.get(way)) for way in (IN_PLACE, TRACED, TRAIN_STEP, CAPTURED))
        for rows in ROWS:
            yield from (_microseconds(self.seconds.get(rows)), _times(self.speedups.get(rows)))


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:.1f}"


def _times(speedup: float | None) -> str:
    return "" if speedup is None else f"[{'green' if speedup >= 1 else 'red'}]{speedup:.2f}[/]"


def main() -> None:
    """Measure programs and print a line for each, the reasons of what was refused, and what it comes to."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("--only", metavar="NAMES", default="", help="parts of names of programs, between commas (all)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of all contenders (1)")
    parser.add_argument("--rounds", type=int, default=31, metavar="N", help="at most, 2 or more (31)")
    parser.add_argument("--patience", type=float, default=5.0, metavar="S", help="seconds for each race (5)")
    options = parser.parse_args()

    chosen = select(options.only)
    out, machine = console(), describe(options.threads)
    table = Table(title=f"programs: {machine}", caption=CAPTION.strip(), caption_justify="left")
    for name in ("program", "parameters", "linears in place", "trace=True", "frozen", TRAIN_STEP, CAPTURED):
        table.add_column(name, justify="right" if name == "parameters" else "left")
    columns = ("difference", "step, us", "in place x", "trace=True x", "TrainStep x", "captured x")
    for name in (*columns, *(f"{rows} row{'s' * (rows > 1)}{unit}" for rows in ROWS for unit in (", us", " x"))):
        table.add_column(name, justify="right")
    found = []
    for kind in chosen:
        if find_spec(kind.package) is None:
            out.print(f"{kind.name} is left out: {kind.package} is not there, which is of the extra 'models'")
            continue
        found.append(measured(kind, Effort(options.rounds, options.patience)))
        table.add_row(*found[-1].cells())
    out.print(table)
    print_reasons(out, found)
    out.print("\n".join(totals(found)), highlight=False)


def select(only: str) -> list[type[Subject]]:
    """Return the programs that have one of some parts in their name, all for none.

    Raises:
        SystemExit: for a part that no name has.
    """
    parts = [part.strip().lower() for part in only.split(",") if part.strip()]
    for part in parts:
        if not any(part in kind.name.lower() for kind in SUBJECTS):
            names = ", ".join(kind.name for kind in SUBJECTS)
            raise SystemExit(f"benchmarks.models: no program's name holds {part!r}; there are: {names}")
    return [kind for kind in SUBJECTS if not parts or any(part in kind.name.lower() for part in parts)]


def measured(kind: type[Subject], effort: Effort) -> Measured:
    """Compare a program in each way that takes it, then time them beside one another."""
    subject, plain, contenders, why_not = taken(kind, torch.float64)
    subject.steps = STEPS
    reference = Reference(subject, plain, steps=True, probes=PROBES)
    shares = [
        found.share(part)
        for name, (model, make) in contenders.items()
        if name != EAGER
        for found in [reference.compare(model, make)]
        for part in PARTS
    ]
    fused = {way: ways.fused(contenders[way][0]) for way in (IN_PLACE, TRACED) if way in contenders}
    times, speedups = of_steps(kind, effort)
    served = of_requests(kind, effort)
    if isinstance(served, str):
        why_not["frozen"] = served
    else:
        times, speedups = times | served[0], speedups | served[1]
    return Measured(
        kind.name,
        sum(p.numel() for p in plain.parameters() if p.requires_grad),
        ways.linears(subject, plain),
        fused,
        why_not,
        max(shares),
        times,
        speedups,
    )


#: Models, and who makes their steps, by the way.
Contenders = Mapping[str, tuple[nn.Module, Maker]]


def taken(kind: type[Subject], dtype: torch.dtype) -> tuple[Subject, nn.Module, Contenders, dict[str, str]]:
    """Return a program, its model, what else trains such a model, and why what is missing does not."""
    subject = kind(dtype)
    plain = plain_of(subject)
    contenders: dict[str, tuple[nn.Module, Maker]] = {EAGER: (plain, in_a_loop)}
    why_not: dict[str, str] = {}
    for way, trace in ((IN_PLACE, False), (TRACED, True)):
        model = ways.converted(subject, copy.deepcopy(plain), trace)
        if isinstance(model, str):
            why_not[way] = model
        else:
            contenders[way] = model, in_a_loop
    loops: dict[str, tuple[Callable[[Subject, nn.Module], str], Maker]] = {
        TRAIN_STEP: (ways.why_no_train_step, ways.in_one_call),
        CAPTURED: (ways.why_not_captured, ways.captured),
    }
    for way, (ask, make) in loops.items():
        why_not[way] = ask(subject, plain)
        if not why_not[way]:
            contenders[way] = copy.deepcopy(plain), make
    return subject, plain, contenders, {way: reason for way, reason in why_not.items() if reason}


def of_steps(kind: type[Subject], effort: Effort) -> tuple[dict[str | int, float], dict[str | int, float]]:
    """Return the seconds of a step as it is, and the speedups of the other ways."""
    subject, _, contenders, _ = taken(kind, torch.float32)
    calls = {way: _step(subject, model.train(), make) for way, (model, make) in contenders.items()}
    times = race(calls, effort)
    steps = subject.steps if subject.loop else 1
    speedups: dict[str | int, float] = {way: ratio(times[EAGER], times[way]) for way in calls if way != EAGER}
    return {EAGER: median(times[EAGER]) / steps}, speedups


def _step(subject: Subject, model: nn.Module, make: Maker) -> Callable[[], Any]:
    """Return what does a step on the next batch, or where the loop is a library's a training."""
    if subject.loop:
        return partial(subject.train, model)
    step, batches = make(subject, model, subject.optimizers(model)), cycle([subject.batch(i) for i in range(4)])
    return lambda: step(*next(batches))


def of_requests(kind: type[Subject], effort: Effort) -> tuple[dict[str | int, float], dict[str | int, float]] | str:
    """Return the seconds of inference as it is and the speedups of frozen networks, by rows; or why there is none."""
    subject = kind(torch.float32)
    model = plain_of(subject)
    frozen = ways.frozen(subject, model)
    if isinstance(frozen, str):
        return frozen
    network = subject.served(model)
    seconds: dict[str | int, float] = {}
    speedups: dict[str | int, float] = {}
    with torch.inference_mode():
        for rows in ROWS:
            inputs = subject.requests(rows)
            times = race({"eager": partial(network, *inputs), "frozen": partial(frozen, *inputs)}, effort)
            seconds[rows], speedups[rows] = median(times["eager"]), ratio(times["eager"], times["frozen"])
    return seconds, speedups


def print_reasons(out: Console, found: Sequence[Measured]) -> None:
    """Print a line for each program and way that was refused."""
    table = Table("program", "refused by", "reason", title="what is refused, and why")
    for row in found:
        for way, reason in row.why_not.items():
            table.add_row(row.name, way, escape(in_short(reason)))
    if table.row_count:
        out.print(table)


def in_short(reason: str) -> str:
    """Return the first thing that a reason says: of a forward what it raised, of no chain why it is no graph either."""
    _, _, raised = reason.partition(" It says: ")
    _, _, of_graph = reason.partition("; nor is it a graph of layers: ")
    return raised or (of_graph or reason.partition("; ")[0]).partition(", expected exactly")[0]


def totals(found: Sequence[Measured]) -> Iterator[str]:
    """Yield what the table comes to: counts, and geometric means of the speedups."""
    linears = sum(row.linears for row in found)
    counts = [
        f"{way} {sum(row.fused[way].layers for row in found if way in row.fused)} of {linears}"
        for way in (IN_PLACE, TRACED)
    ]
    yield f"linears fused: {', '.join(counts)}"
    for way in ("frozen", TRAIN_STEP, CAPTURED):
        yield f"{way}: {sum(way not in row.why_not for row in found)} of {len(found)} programs"
    titles: dict[str | int, str] = {way: way for way in (IN_PLACE, TRACED, TRAIN_STEP, CAPTURED)}
    titles |= {rows: f"frozen, {rows} row{'s' * (rows > 1)}" for rows in ROWS}
    means = []
    for key, title in titles.items():
        speedups = [row.speedups[key] for row in found if key in row.speedups]
        if speedups:
            means.append(f"{title} {geometric_mean(speedups):.2f} ({len(speedups)})")
    yield f"geometric means over eager, and of how many programs: {', '.join(means)}"


if __name__ == "__main__":
    main()
