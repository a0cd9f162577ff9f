"""Layers of random shapes, dtypes, layouts and activations, so that no table decides what is fast.

Rows, columns and depth of the product are log-uniform from 1 to 4096. A draw of more than `MOST`
multiplications is drawn again, for float16 at fewer: eager needs up to 2 ns for one of those. Every case
is checked, then timed against eager, round by round. Those found slower than `FLOOR` are timed again,
longer, and the second time counts.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import log
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Literal

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import fastmlp
from benchmarks.check import SPREAD, Estimate, compare, unit
from benchmarks.machine import describe
from benchmarks.plots import histogram
from benchmarks.tables import console
from benchmarks.targets import Outcome
from fastmlp import _C
from fastmlp.activations import DEFAULTS, Activation, module_of
from fastmlp.benchmark.machine import dtype_name
from fastmlp.benchmark.timing import Effort, race

#: "row-major", its transpose, or every second element of a larger matrix's rows.
Storage = Literal["row-major", "transposed", "strided"]

LARGEST = 4096
MOST = {torch.float32: 1 << 30, torch.float64: 1 << 30, torch.bfloat16: 1 << 30, torch.float16: 1 << 27}

#: Its id among the targets.
RANDOM = "random"

#: In which the distribution is shown, by rows.
CLASSES = ((1, 8), (9, 64), (65, 512), (513, LARGEST))

#: The speed relative to eager below which a case needs a reason.
FLOOR = 0.9

FIRST, SECOND = Effort(rounds=15, patience=0.5), Effort(rounds=101, patience=4.0)

#: Units of the last place that an activation or its derivative, evaluated on the data, may lose.
ULPS = 8


@dataclass(frozen=True)
class Case:
    """A layer and a batch.

    Attributes:
        rows: M, of the input.
        columns: N, features of the output.
        depth: K, features of the input.
        dtype: by name.
        input: how it is stored.
        weight: how it is stored.
        activation: by name.
        backward: whether the gradients of input, weight and bias are computed too.
    """

    rows: int
    columns: int
    depth: int
    dtype: str
    input: Storage
    weight: Storage
    activation: str
    backward: bool

    def __str__(self) -> str:
        task = "forward_backward" if self.backward else "infer"
        return (
            f"{self.rows}x{self.columns}x{self.depth} {self.dtype} {self.input}/{self.weight} {self.activation} {task}"
        )


@dataclass(frozen=True)
class Result:
    """A case and our speed on it.

    Attributes:
        case: what was computed.
        speedup: median over the rounds of eager's time divided by ours.
        low: first quartile of the same.
        high: third quartile of the same.
        eager_us: eager's time.
        obstacle: what keeps the case from our kernels; None if they compute it.
    """

    case: Case
    speedup: float
    low: float
    high: float
    eager_us: float
    obstacle: str | None


def draw(count: int, seed: int) -> Iterator[Case]:
    """Yield random cases, the same for the same seed.

    Args:
        count: how many.
        seed: of the random numbers.

    Example:
        >>> max(case.rows for case in draw(100, seed=0)) <= LARGEST
        True
    """
    random = Random(seed)
    stores: tuple[Storage, ...] = ("row-major", "transposed", "strided")

    def size() -> int:
        return round(2 ** random.uniform(0, log(LARGEST, 2)))

    while count:
        dtype, (rows, columns, depth) = random.choice(list(MOST)), (size(), size(), size())
        rest = (random.choice(stores), random.choice(stores), random.choice(list(DEFAULTS)), random.random() < 0.5)
        if rows * columns * depth <= MOST[dtype]:
            count -= 1
            yield Case(rows, columns, depth, dtype_name(dtype), *rest)


class Layers:
    """Both ways to compute a case, on the same data."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(1)

        def make(rows: int, columns: int, storage: Storage) -> Tensor:
            if storage == "transposed":
                return make(columns, rows, "row-major").T
            if storage == "strided":
                return make(rows, 2 * columns, "row-major")[:, ::2]
            return torch.randn(rows, columns, generator=generator).to(getattr(torch, case.dtype))

        self.case = case
        self.input = make(case.rows, case.depth, case.input)
        self.weight = make(case.columns, case.depth, case.weight).mul_(case.depth**-0.5)
        self.bias = make(1, case.columns, "row-major")[0]
        self.grad = make(case.rows, case.columns, "row-major")
        self.backward = case.backward
        self.activation = Activation(case.activation)
        self.module = module_of(self.activation)
        self.leaves = (self.input, self.weight, self.bias)
        for leaf in self.leaves:
            leaf.requires_grad_(case.backward)

    def eager(self) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(self.backward):
            return self._finish(self.module(F.linear(*self.leaves)))

    def ours(self) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(self.backward):
            return self._finish(fastmlp.functional.linear(*self.leaves, self.activation))

    def _finish(self, output: Tensor) -> tuple[Tensor, ...]:
        return (output, *torch.autograd.grad(output, self.leaves, self.grad)) if self.backward else (output,)

    def verify(self) -> None:
        """Compare ours with float64.

        Raises:
            AssertionError: if a result is farther from the expected one than rounding explains.
        """
        names = ("output", "gradient of input", "gradient of weight", "gradient of bias")
        pairs = zip(self._expected(), self.ours(), strict=True)
        for name, (estimate, found) in zip(names, pairs, strict=False):
            compare(found, estimate, f"{name} of {self.case}")

    def time(self, effort: Effort) -> Result:
        """Time both ways, round by round."""
        samples = race({"eager": self.eager, "ours": self.ours}, effort)
        ratios = [eager / ours for eager, ours in zip(samples["eager"], samples["ours"], strict=True)]
        low, speedup, high = quantiles(ratios, n=4, method="inclusive")
        obstacle = _C.obstacle(self.input, (self.weight, self.bias))
        return Result(self.case, speedup, low, high, median(samples["eager"]) * 1e6, obstacle)

    def _expected(self) -> Iterator[Estimate]:
        input, weight, grad = map(Estimate.exact, (self.input, self.weight, self.grad))
        ones = torch.ones(len(self.input), 1, dtype=torch.float64)
        dtype = self.input.dtype
        augmented = Estimate.exact(torch.column_stack((self.weight.detach(), self.bias.detach())))
        # The bias is one more column of the weight, for which the input has a column of ones.
        columns = Estimate.exact(torch.column_stack((input.value, ones)))._replace(dtype=dtype)
        # PyTorch stores what the activation takes.
        total = (columns @ augmented.T).stored()
        yield self._through(total, self.module).stored()
        if not self.backward:
            return

        def slope(at: Tensor) -> Tensor:
            with torch.enable_grad():
                leaf = at.clone().requires_grad_()
                return torch.autograd.grad(self.module(leaf).sum(), leaf)[0]

        derivative = self._through(total, slope)
        # It may follow from the output as stored, as 1 - y**2 of tanh does, and is then off by twice that.
        error = grad.value.abs() * (derivative.error + 2 * unit(dtype) * (1 + derivative.value.abs()))
        inner = Estimate(grad.value * derivative.value, SPREAD * error, dtype).stored(SPREAD)
        yield (inner @ weight).stored()
        both = (inner.T @ columns).stored()
        yield Estimate(both.value[:, :-1], both.error[:, :-1], dtype)
        yield Estimate(both.value[:, -1], both.error[:, -1], dtype)

    def _through(self, argument: Estimate, function: Callable[[Tensor], Tensor]) -> Estimate:
        """Apply a function element by element: it may be off as much as it changes over its argument's error."""
        value, error, dtype = argument
        result = function(value)
        change = torch.zeros_like(result)
        for part in (-1, -0.5, 0.5, 1):
            change = torch.maximum(change, (function(value + part * error) - result).abs())
        computed = unit(torch.float64 if dtype is torch.float64 else torch.float32)
        own = ULPS * computed * (1 + result.abs() + value.abs())
        return Estimate(result, change + own, dtype)


def run(count: int, seed: int, threads: int, out: Console, folder: Path) -> Outcome:
    """Check and time random cases, the slow ones twice, and say whether one is slower than it may be.

    Prints the distribution of the speed, and the slow cases; writes all of them, and a histogram.

    Args:
        count: how many.
        seed: of the random numbers.
        threads: of both contenders.
        out: where to print.
        folder: where to write.
    """
    machine = describe(threads)
    results = []
    for case in track(list(draw(count, seed)), description="random shapes", console=out, transient=True):
        layers = Layers(case)
        try:
            layers.verify()
        except AssertionError as error:
            out.print(f"[red]wrong:[/] {error}")
            continue
        result = layers.time(FIRST)
        results.append(layers.time(SECOND) if result.speedup < FLOOR else result)

    out.print(_distribution(results, f"random shapes, seed {seed}: {machine}"))
    slow = sorted((result for result in results if result.speedup < FLOOR), key=lambda result: result.speedup)
    if slow:
        out.print(_slow(slow))
    speedups: dict[str, list[float]] = {}
    for result in results:
        speedups.setdefault(result.case.dtype, []).append(result.speedup)
    folder.mkdir(parents=True, exist_ok=True)
    histogram(speedups, folder / "random_shapes.png")
    text = json.dumps([asdict(result) for result in results], indent=2)
    (folder / "random_shapes.json").write_text(text + "\n", encoding="utf-8")

    worst = min(results, key=lambda result: result.speedup)
    met = len(results) - len(slow)
    measured = f"{worst.speedup:.2f}, {met} of {count} met"
    if wrong := count - len(results):
        measured += f", {wrong} wrong"
    if outside := sum(result.obstacle is not None for result in slow):
        measured += f", {outside} not in our kernels"
    return Outcome(RANDOM, "random shapes", f">= {FLOOR:.2f} x eager", measured, met == count, str(worst.case))


def _distribution(results: Sequence[Result], title: str) -> Table:
    table = Table("cases", title=title, caption="x eager; M: rows of the input")
    for name in ("number", "least", "5 %", "25 %", "median", "75 %", "95 %", "most", f"< {FLOOR}", "< 1"):
        table.add_column(name, justify="right")
    groups: dict[str, Callable[[Case], bool]] = {"all": lambda case: True}
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


def _has_dtype(dtype: str, case: Case) -> bool:
    return case.dtype == dtype


def _has_rows(low: int, high: int, case: Case) -> bool:
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
    parser.add_argument("--count", type=int, default=200, metavar="N", help="of cases (200)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random numbers (0)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of PyTorch and fastmlp (1)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), metavar="FOLDER", help="for files (out/bench)")
    options = parser.parse_args()

    out = console()
    outcome = run(options.count, options.seed, options.threads, out, options.out)
    out.print(f"{outcome.goal}: {outcome.measured}")


if __name__ == "__main__":
    main()
