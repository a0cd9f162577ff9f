"""What is asked of translated kernels. Each check gives rows that say what came out for every kernel.

bits: Activations that only add, multiply, divide, compare and select: results have the bits of the shim's, which is the
    same source compiled by the host compiler. Both fuse a * b + c; products of 16-bit numbers are exact in float32, so
    tensor cores have no choice but the order of the sums, which the emulator fixes for both.
bounds: Every activation, within the bounds of tests/support/bounds.py, from the data. Exponentials and the like come
    from libdevice here and from glibc in the shim: two good approximations whose last bits differ.
profile: Bank conflicts and sectors, on whole aligned tiles.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from fastmlp import Activation
from fastmlp.activations import resolve
from tests.emulator.ptx.names import readable
from tests.emulator.ptx.translate import Kernel
from tests.support.emulated import ORDERS, checks, emulated, set_up
from tests.support.layouts import parts_of_chunks

EXACT = [resolve(name) for name in ("identity", "relu", "leaky_relu", "hardswish")]


@dataclass(frozen=True)
class Case:
    """A forward and a backward pass."""

    rows: int
    widths: tuple[int, ...]
    act: Activation
    tile: int = -1
    fuses: bool = False
    padded: bool = False  # rows begin 16 bytes apart or a multiple, and end before
    order: str = "fifo"
    card: int = 0  # another architecture, whose number of multiprocessors counts

    def run(self, dtype: torch.dtype, architecture: int, route: int) -> list[Tensor]:
        """What it computes, which is within the bounds; on translated kernels, or, with route 0, on the shim's."""
        torch.manual_seed(0)
        set_up(self.card or architecture, self.tile, self.order, self.fuses)
        pairs = list(pairwise(self.widths))
        arrange = parts_of_chunks if self.padded else torch.clone
        emulated().set_route(route)
        try:
            return checks.check(
                arrange(torch.randn(self.rows, self.widths[0], dtype=dtype)),
                [arrange(torch.randn(n, k, dtype=dtype) / k**0.5) for k, n in pairs],
                [torch.randn(n, dtype=dtype) if i % 2 == 0 else None for i, (_, n) in enumerate(pairs)],
                [self.act] * len(pairs),
                arrange(torch.randn(self.rows, self.widths[-1], dtype=dtype)),
            )
        finally:
            emulated().set_route(0)
            set_up()


def shapes(dtype: torch.dtype, architecture: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Tile, rows and widths, of which some reach over the tile's edges: read by vectors, and by elements."""
    tiles = emulated().tiles(architecture, torch.empty(0, dtype=dtype))
    for tile, (bm, bn, bk) in enumerate(tiles):
        yield tile, bm + 8, (2 * bk + 8, bn + 8, 16)
        yield tile, bm + 1, (bk + 1, bn + 1, 3)


def exact_cases(dtype: torch.dtype, architecture: int) -> Iterator[Case]:
    for act, order in zip(EXACT, ORDERS, strict=True):
        for tile, rows, widths in shapes(dtype, architecture):
            yield Case(rows, widths, act, tile, order=order)
        # Sums over the batch in several parts.
        yield Case(600, (9, 7), act)
        yield Case(600, (16, 8), act)
        yield from fused_cases(dtype, act)


def fused_cases(dtype: torch.dtype, act: Activation) -> Iterator[Case]:
    """Every width of the kernels, by vectors and by elements; with as many rows as their larger tiles take."""
    if dtype == torch.float64:
        return
    yield Case(35, (8, 64, 16, 12), act, fuses=True)
    yield Case(70, (9, 1, 128, 2, 6), act, fuses=True)
    yield Case(35, (9, 20, 6), act, fuses=True, padded=True)
    yield Case(35, (9, 68, 6), act, fuses=True, padded=True)
    if dtype == torch.float32:
        yield Case(35, (9, 17, 6), act, fuses=True)
        # Many rows take long: each activation in one of the three kernels.
        width = (32, 64, 128)[act.kind % 3]
        yield Case(many_rows(width), (1, 1, width), act, fuses=True, card=FEW_MULTIPROCESSORS)


#: The T4: forward takes its large tiles of float32 from so many rows on as give each multiprocessor one.
FEW_MULTIPROCESSORS = 75


def many_rows(width: int) -> int:
    return 40 * 8192 // width


def bounded_cases(dtype: torch.dtype, activations: Iterable[Activation]) -> Iterator[Case]:
    """Each kernel holds the code of every activation."""
    for act in activations:
        for tile in range(3):
            yield Case(9, (8, 16, 8), act, tile)
            yield Case(9, (5, 9, 3), act, tile)
        yield from fused_cases(dtype, act)


#: In place of a kernel's name, where a case fails before it has run any.
NO_KERNEL = "none"


@dataclass
class Tally:
    """Of one kernel in one check."""

    cases: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    kernel: str
    dtype: str
    architecture: int
    check: str
    result: str  # "passed" and of what, or "failed" and why

    @property
    def passed(self) -> bool:
        return self.result.startswith("passed")


def rows_of(
    kernels: Iterable[str], tallies: dict[str, Tally], dtype: torch.dtype, architecture: int, check: str
) -> list[Row]:
    """A kernel that no case has run has failed; so has a case that has run none."""
    rows = []
    for name in [*kernels, *(other for other in tallies if other == NO_KERNEL)]:
        tally = tallies.get(name, Tally(failures=["was not run"]))
        result = f"failed: {tally.failures[0]}" if tally.failures else f"passed: {tally.cases} cases"
        rows.append(Row(readable(name), str(dtype).removeprefix("torch."), architecture, check, result))
    return rows


def run_cases(
    cases: Iterable[Case], dtype: torch.dtype, architecture: int, judge: Callable[[Case, list[Tensor]], None]
) -> dict[str, Tally]:
    """Every case on translated kernels; `judge` raises AssertionError where results are not as they should be."""
    tallies: dict[str, Tally] = defaultdict(Tally)
    for case in cases:
        failure = ""
        emulated().take_executed()
        try:
            judge(case, case.run(dtype, architecture, architecture))
        except (AssertionError, RuntimeError) as error:
            failure = f"{case}: {str(error).splitlines()[0]}"
        ran = emulated().take_executed()
        for name in ran or ([NO_KERNEL] if failure else []):
            tallies[name].cases += 1
            tallies[name].failures += [failure] * bool(failure)
    return tallies


def bits(kernels: dict[str, Kernel], dtype: torch.dtype, architecture: int) -> list[Row]:
    """The same bits as the shim's."""

    def judge(case: Case, results: list[Tensor]) -> None:
        expected = case.run(dtype, architecture, 0)
        for i, (ours, shims) in enumerate(zip(results, expected, strict=True)):
            if not torch.equal(ours, shims):
                different = (ours != shims).sum().item()
                raise AssertionError(f"result {i} differs from the shim's in {different} of {ours.numel()} elements")

    tallies = run_cases(exact_cases(dtype, architecture), dtype, architecture, judge)
    return rows_of(kernels, tallies, dtype, architecture, "bits")


def bounds(
    kernels: dict[str, Kernel], dtype: torch.dtype, architecture: int, activations: Iterable[Activation]
) -> list[Row]:
    """Every activation within its bounds."""
    tallies = run_cases(bounded_cases(dtype, activations), dtype, architecture, lambda case, results: None)
    return rows_of(kernels, tallies, dtype, architecture, "bounds")
