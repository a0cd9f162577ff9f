"""The memory profile of translated kernels: bank conflicts and sectors, of whole aligned tiles.

`ratio` is what warps took over what they would have taken without conflicts, and with every byte of a sector used.
translated.h says how both are counted.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastmlp.activations import resolve
from tests.emulator.ptx.checks import FEW_MULTIPROCESSORS, Case, Row, many_rows
from tests.emulator.ptx.names import readable
from tests.emulator.ptx.translate import Kernel
from tests.support.emulated import ROOT, emulated

#: Gates, for every kernel: wavefronts of shared memory in main loops and around them, and sectors of global memory.
MAIN_LOOP = 1.0
AROUND = 1.05
SECTORS = 1.05


@dataclass(frozen=True)
class Access:
    """An instruction of a kernel."""

    kernel: str  # mangled
    opcode: str
    source: str  # file:line
    section: str
    shared: bool
    bytes: int
    accesses: int
    actual: int
    ideal: int

    @property
    def ratio(self) -> float:
        return self.actual / self.ideal


def whole_tiles(dtype: torch.dtype) -> list[Case]:
    """All operands aligned, and all products of whole tiles of every size."""
    act = resolve("leaky_relu")
    cases = [Case(128, (128, 128, 128), act, tile) for tile in range(3)]
    # Many rows: sums of partial sums.
    cases.append(Case(1024, (64, 128), act))
    if dtype != torch.float64:
        # Of 16 bits, layers up to 32 in lines of 64 are not whole: forward takes 1.94 times the wavefronts there.
        widths = (32, 64, 128) if dtype == torch.float32 else (64, 128)
        cases += [Case(128, (w, w, w), a, fuses=True) for w in widths for a in (act, resolve("relu"))]
    if dtype == torch.float32:
        # Of the three kernels for many rows one: the others take as long again.
        cases.append(Case(many_rows(64), (64, 64, 64), act, fuses=True, card=FEW_MULTIPROCESSORS))
    return cases


def accesses(kernels: dict[str, Kernel], run: Callable[[], None]) -> list[Access]:
    """Of these translated kernels while `run` runs."""
    emulated().take_profile()
    emulated().set_profile(True)
    try:
        run()
    finally:
        emulated().set_profile(False)
    found = []
    for name, line, shared, *numbers in emulated().take_profile():
        site = kernels[name].sites.get(line)
        # Device functions that were not inlined read tables of constants, and nothing else.
        if site is not None:
            place = f"{relative(site.source.file)}:{site.source.line}"
            found.append(Access(name, site.opcode, place, site.section, shared, *numbers))
    return found


def measure(kernels: dict[str, Kernel], dtype: torch.dtype, architecture: int, cases: Iterable[Case]) -> list[Access]:
    def run() -> None:
        for case in cases:
            case.run(dtype, architecture, architecture)

    return accesses(kernels, run)


def relative(file: str) -> str:
    path = Path(file).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def ratio(of: Sequence[Access]) -> float:
    """Of all together; 1 of none."""
    ideal = sum(a.ideal for a in of)
    return sum(a.actual for a in of) / ideal if ideal else 1.0


@dataclass(frozen=True)
class Ratios:
    """Of one kernel."""

    kernel: str  # mangled
    main_loop: float  # wavefronts of shared memory
    around: float  # the same before and behind the main loop
    sectors: float  # of global memory
    worst: str  # the instruction that wastes most

    def misses(self) -> list[str]:
        found = []
        if self.main_loop > MAIN_LOOP:
            found.append(f"shared memory in the main loop at {self.main_loop:.2f}")
        if self.around > AROUND:
            found.append(f"shared memory around the main loop at {self.around:.2f}")
        if self.sectors > SECTORS:
            found.append(f"global sectors at {self.sectors:.2f}")
        return found


def summary(of: Iterable[Access]) -> list[Ratios]:
    by_kernel: dict[str, list[Access]] = defaultdict(list)
    for access in of:
        by_kernel[access.kernel].append(access)
    rows = []
    for kernel, all in by_kernel.items():
        shared = [a for a in all if a.shared]
        worst = max(all, key=lambda a: a.actual - a.ideal)
        rows.append(
            Ratios(
                kernel,
                ratio([a for a in shared if a.section == "main loop"]),
                ratio([a for a in shared if a.section != "main loop"]),
                ratio([a for a in all if not a.shared]),
                f"{worst.source} {worst.opcode}, {worst.section}: {worst.ratio:.2f}" if worst.ratio > 1 else "",
            )
        )
    return rows


def profile(kernels: dict[str, Kernel], dtype: torch.dtype, architecture: int) -> list[Row]:
    """One row for each kernel that whole tiles run; those that read element by element are not among them."""
    rows = []
    for r in summary(measure(kernels, dtype, architecture, whole_tiles(dtype))):
        # Of bfloat16 before sm_80 all products.
        if "elements" in readable(r.kernel):
            continue
        ratios = f"{r.main_loop:.2f} {r.around:.2f} {r.sectors:.2f}"
        misses = r.misses()
        result = f"failed: {', '.join(misses)}; {r.worst}" if misses else f"passed: {ratios} {r.worst}"
        rows.append(Row(readable(r.kernel), str(dtype).removeprefix("torch."), architecture, "profile", result))
    return rows
