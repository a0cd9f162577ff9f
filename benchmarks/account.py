"""Where the microseconds of a training step go: the parts of a loop, and of `TrainStep`.

A loop is measured from inside, by reading the clock between its lines. `TrainStep` is one call, so its parts are
measured from outside, by leaving something out: two steps that differ in one thing are timed in turn, and the part is
their difference.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

from rich.table import Table

import fastmlp
from benchmarks.check import verify
from benchmarks.contenders import YARDSTICK
from benchmarks.contenders.base import ModuleContender
from benchmarks.contenders.pytorch import Eager, Fastmlp, FastmlpOptim, TrainStep
from benchmarks.machine import describe, peak
from benchmarks.plots import stacked
from benchmarks.tables import console
from benchmarks.targets import find
from benchmarks.workloads import Workload
from fastmlp import _C
from fastmlp.benchmark.timing import AWAKE, Effort, race

#: What is taken apart unless the command line says otherwise.
WORKLOADS = ("tutorial b32 step sgd", "tutorial b32 step adam")

#: The lines of the loop, and what is left of its time.
LINES = ("zero_grad", "forward", "loss", "backward", "optimizer")
REST = "rest"

#: Of TrainStep, forward and loss cannot be told apart from outside.
TOGETHER = "in forward"

LOOPS: dict[str, type[ModuleContender]] = {
    "torch's model and optimizer": Eager,
    "fastmlp's model": Fastmlp,
    "fastmlp's model and optimizer": FastmlpOptim,
}
STEP = "TrainStep"

#: Of a loop between two looks at what its lines took: a sample of small steps is about as long.
STEPS = 8

HOW = f"""
the loops: {", ".join(LINES)}: the clock is read between the lines; means of {STEPS} steps, of which the median, less \
what a reading takes. total: the same loop without readings, in turn with all others. {REST}: the total less the lines.
{STEP}: each part is the median over rounds of the difference of two steps, timed in turn, as the table below says."""


@dataclass(frozen=True)
class Account:
    """What one way of training takes, in seconds.

    Attributes:
        workload: its name.
        way: of training.
        parts: by name; they add up to the total.
        total: of one step.
    """

    workload: str
    way: str
    parts: dict[str, float]
    total: float


@dataclass(frozen=True)
class Part:
    """Something that `TrainStep` does, measured from outside.

    Attributes:
        name: in words.
        how: it was measured.
        seconds: it took.
    """

    name: str
    how: str
    seconds: float


class Clocked:
    """Steps of a loop with the clock read between its lines, as the contender itself writes them."""

    def __init__(self, contender: ModuleContender) -> None:
        self.contender = contender
        self.means: list[list[float]] = []
        self.disturbed: list[list[float]] = []

    def __call__(self) -> None:
        """Do `STEPS` steps after one that does not count, and note what each line took, and a reading, on average."""
        sums = [0.0] * (len(LINES) + 1)
        began, ran = perf_counter(), process_time()
        for readings in islice(self._steps(), 1, STEPS + 1):
            for i, (start, end) in enumerate(pairwise(readings)):
                sums[i] += end - start
        awake = process_time() - ran > AWAKE * (perf_counter() - began)
        (self.means if awake else self.disturbed).append([total / STEPS for total in sums])

    def _steps(self) -> Iterator[tuple[float, ...]]:
        """Step, and yield the clock before each line, after the last, and once more for what a reading takes."""
        model, loss_fn, optimizer = self.contender.model, self.contender.loss, self.contender.optimizer
        input, target = self.contender.input, self.contender.target
        while True:
            start = perf_counter()
            optimizer.zero_grad()
            zeroed = perf_counter()
            output = model(input)
            forward = perf_counter()
            loss = loss_fn(output, target)
            compared = perf_counter()
            loss.backward()
            backward = perf_counter()
            optimizer.step()
            stepped = perf_counter()
            yield start, zeroed, forward, compared, backward, stepped, perf_counter()

    def lines(self) -> dict[str, float]:
        """Return the seconds of each line, less those of a reading, from calls in which the process kept running."""
        *lines, reading = (median(means) for means in zip(*(self.means or self.disturbed), strict=True))
        return {name: seconds - reading for name, seconds in zip(LINES, lines, strict=True)}


def take_apart(workload: Workload, effort: Effort) -> tuple[list[Account], list[Part]]:
    """Measure all ways on a workload.

    Args:
        workload: a training step.
        effort: how long to try.

    Returns:
        An account of each way, and the parts of `TrainStep`.

    Raises:
        AssertionError: if a result is wrong.
    """
    kinds: list[type[ModuleContender]] = [*LOOPS.values(), TrainStep]
    for kind in kinds:
        verify(kind(workload))
    clocked = {way: Clocked(kind(workload)) for way, kind in LOOPS.items()}
    calls: dict[str, Callable[[], Any]] = {way: partial(_repeat, kind(workload).call) for way, kind in LOOPS.items()}
    for way, loop in clocked.items():
        calls[f"{way}, clocked"] = loop
    samples = race(calls | _steps(workload), effort)

    accounts = []
    for way, loop in clocked.items():
        lines, total = loop.lines(), median(samples[way]) / (1 + STEPS)
        accounts.append(Account(workload.name, way, lines | {REST: total - sum(lines.values())}, total))
    parts = list(_parts(samples, workload.batch))
    return [*accounts, _account(workload, parts, median(samples[STEP]))], parts


def _repeat(step: Callable[[], Any]) -> None:
    """Step as often as `Clocked` does, so that caches are as warm."""
    for _ in range(1 + STEPS):
        step()


def _steps(workload: Workload) -> dict[str, Callable[[], Any]]:
    """Return `TrainStep` as it is and with things left out, and what is less than any of them."""
    one_row = replace(workload, batch=1)
    whole, few = Fastmlp(workload), Fastmlp(one_row)
    frozen, frozen_few = fastmlp.freeze(whole.model), fastmlp.freeze(few.model)
    return {
        STEP: _step(workload),
        "no .grad": _step(workload, keep_grads=False),
        "update": _update(workload),
        "update of one": _update(workload, most=False),
        "no backward": _step(workload, most=False),
        "one row": _step(one_row, most=False),
        "call": partial(_C.obstacle, whole.input, (whole.target,)),
        "frozen": partial(frozen, whole.input),
        "frozen, one row": partial(frozen_few, few.input),
    }


def _step(workload: Workload, most: bool = True, keep_grads: bool = True) -> Callable[[], Any]:
    """Return `TrainStep`'s call, in which all parameters require a gradient or, without most, the last bias only."""
    own = Fastmlp(workload)
    *others, _ = own.model.parameters()
    for parameter in others:
        parameter.requires_grad_(most)
    step = fastmlp.TrainStep(own.model, own.loss, own.optimizer, keep_grads=keep_grads)
    return partial(step, own.input, own.target)


def _update(workload: Workload, most: bool = True) -> Callable[[], Any]:
    """Return the step of our optimizer, which finds a gradient at all parameters or, without most, at the last bias."""
    own = FastmlpOptim(workload)
    own.step()
    *others, _ = own.model.parameters()
    for parameter in others:
        parameter.grad = parameter.grad if most else None
    return own.optimizer.step


def _parts(samples: Mapping[str, Sequence[float]], rows: int) -> Iterator[Part]:
    def less(more: str, fewer: str) -> float:
        return median(a - b for a, b in zip(samples[more], samples[fewer], strict=True))

    both, update = less(STEP, "no backward"), less("update", "update of one")
    yield Part(
        "optimizer", "fastmlp.optim's step alone: all parameters have a gradient, less the last bias only", update
    )
    yield Part(
        "backward",
        "all parameters require a gradient, less the last bias only; less the optimizer, as above",
        both - update,
    )
    yield Part("  of it: .grad", "keep_grads=True, less keep_grads=False", less(STEP, "no .grad"))
    yield Part(
        "forward and loss",
        f"only the last bias requires a gradient: {rows} rows, less 1 row",
        less("no backward", "one row"),
    )
    yield Part("  for comparison: frozen", f"freeze(model): {rows} rows, less 1 row", less("frozen", "frozen, one row"))
    yield Part(
        "model and state",
        "only the last bias requires a gradient, 1 row, less an empty call: reads and checks children, parameters, "
        "groups and state, makes the loss, computes one row",
        less("one row", "call"),
    )
    yield Part("call", "an empty call: _C.obstacle(input, (target,)), which looks at both", median(samples["call"]))


def _account(workload: Workload, parts: Sequence[Part], total: float) -> Account:
    found = {part.name: part.seconds for part in parts}
    lines = {"forward": found["forward and loss"], "backward": found["backward"], "optimizer": found["optimizer"]}
    return Account(workload.name, STEP, lines | {REST: total - sum(lines.values())}, total)


def main() -> None:
    """Take apart what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.account", description=__doc__)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"steps, by name ({', '.join(WORKLOADS)})")
    parser.add_argument("--rounds", type=int, default=101, metavar="N", help="at most, 2 or more (101)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), metavar="FOLDER", help="for files (out/bench)")
    options = parser.parse_args()
    try:
        workloads = find(options.workloads or WORKLOADS)
    except KeyError as error:
        parser.error(f"no workload has the name {error}")
    if others := [workload.name for workload in workloads if workload.task != "step"]:
        parser.error(f"only training steps are taken apart, got {', '.join(others)}")

    out, machine = console(), describe(threads=1)
    options.out.mkdir(parents=True, exist_ok=True)
    effort = Effort(rounds=options.rounds, patience=20.0)
    accounts: list[Account] = []
    parts: dict[str, list[Part]] = {}
    for workload in workloads:
        found, parts[workload.name] = take_apart(workload, effort)
        accounts += found
    out.print(table(accounts, str(machine)))
    out.print(HOW.strip())
    out.print(table_of_parts(parts))
    for workload in workloads:
        least = workload.flops / peak(workload.dtype) / 1e3
        out.print(f"{workload.name}: its products alone take {least:.2f} us at the core's peak")
    stacked({name: [a for a in accounts if a.workload == name] for name in parts}, STEP, options.out / "account.png")
    report = {
        "machine": asdict(machine),
        "accounts": [asdict(account) for account in accounts],
        "parts": {name: [asdict(part) for part in found] for name, found in parts.items()},
    }
    (options.out / "account.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    out.print(f"plot and figures are in {options.out}: account.png, account.json")


def table(accounts: Sequence[Account], title: str) -> Table:
    """Write a line for each way, in microseconds."""
    made = Table("workload", "training, us", title=f"where a step goes: {title}")
    for name in (*LINES, REST, "total", f"x {YARDSTICK}"):
        made.add_column(name, justify="right")
    previous, eager = "", 0.0
    for account in accounts:
        if account.workload != previous:
            made.add_section()
            eager = account.total
        cells = [_microseconds(account.parts.get(name)) for name in (*LINES, REST)]
        if account.way == STEP:
            cells[LINES.index("zero_grad")], cells[LINES.index("loss")] = "none", TOGETHER
        total = f"[bold]{_microseconds(account.total)}[/]"
        made.add_row(account.workload, account.way, *cells, total, f"{eager / account.total:.1f}")
        previous = account.workload
    return made


def table_of_parts(parts: Mapping[str, Sequence[Part]]) -> Table:
    """Write a line for each part of `TrainStep`, and how it was measured."""
    made = Table(f"{STEP}, us", *parts, "how it was measured", title=f"what {STEP} consists of")
    for same in zip(*parts.values(), strict=True):
        made.add_row(same[0].name, *(_microseconds(part.seconds) for part in same), same[0].how)
    return made


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.2f}"


if __name__ == "__main__":
    main()
