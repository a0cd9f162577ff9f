"""Proves what can be proved of the CUDA kernels without a GPU; docs/gpu.md says what and how.

Fails if anything does, or if a planted defect goes unnoticed. --quick is the part that CI runs.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar, get_args

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tools.gpu_proof import as_compiled, compiled, executed, linked, planted, read, sanitized
from tools.gpu_proof.checks import Check, Gate, Outcome, kinds
from tools.gpu_proof.emulation import ADDRESS, CSRC, THREAD, VARIANTS, build
from tools.gpu_proof.kernels import demangle
from tools.gpu_proof.planted import Caught
from tools.gpu_proof.toolchain import nvcc_version, side_by_side, toolkit

#: Of --quick: one dtype for each family of kernels, two architectures, and the cases of exercise.py that match.
QUICK_DTYPES = ("float32", "float16")
QUICK_ARCHITECTURES = (80, 90)
QUICK_CASES = {ADDRESS.name: "", THREAD.name: "tile (64x64|16x64|32x32).* aligned|narrow"}

#: Architectures whose PTX is translated and run: those from which on device.h has other code.
PTX_ARCHITECTURES = (75, 80, 90)

T = TypeVar("T")

GATES: tuple[Gate, ...] = get_args(Gate)


def console() -> Console:
    """Return standard output, without a right edge where that is a file."""
    made = Console()
    if not made.is_terminal:
        made.width = 250
    return made


class Proof:
    """The gates asked for, run in order, each with its time."""

    def __init__(self, gates: Sequence[str], quick: bool, defects: bool) -> None:
        self.gates, self.quick, self.defects = gates, quick, defects
        self.dtypes = QUICK_DTYPES if quick else compiled.DTYPES
        self.architectures = QUICK_ARCHITECTURES if quick else compiled.ARCHITECTURES
        self.outcomes: list[Outcome] = []
        self.seconds: dict[str, float] = {}
        self.caught: list[Caught] = []
        self.out = console()

    def run(self) -> bool:
        """Run, print, and return whether all holds."""
        cubins: list[compiled.Cubin] = []
        if {"compiled", "read", "executed"} & set(self.gates):
            self.out.print(f"{nvcc_version()} in {toolkit()}")
            cubins = self._timed("compiling", self._compile)
        if "compiled" in self.gates:
            self._gate("compiled", lambda: self._check_compiled(cubins))
            columns, lines = compiled.table(cubins)
            self._table("registers of a thread, bytes of static shared memory of a block", ["kernel", *columns], lines)
        if "read" in self.gates:
            self._gate("read", lambda: [read.check_cubins(cubins)])
        if "sanitized" in self.gates:
            cases = QUICK_CASES if self.quick else {}
            self._gate("sanitized", lambda: sanitized.check(self.dtypes, cases))
        if "executed" in self.gates:
            kernels = {kernel for cubin in cubins for kernel in demangle(cubin.usage).values()}
            self._gate("executed", lambda: [executed.check(kernels)])
        if "as compiled" in self.gates:
            self._gate("as compiled", lambda: [as_compiled.check(self.dtypes, PTX_ARCHITECTURES)])
        if "linked" in self.gates:
            self._gate("linked", lambda: [linked.check()])
        if self.defects:
            self._plant()
        return self._close()

    def _compile(self) -> list[compiled.Cubin]:
        return compiled.compile_all(self.dtypes, self.architectures, CSRC)

    def _check_compiled(self, cubins: list[compiled.Cubin]) -> list[Outcome]:
        found = [compiled.check_cubins(cubins)]
        if not self.quick:
            found.append(compiled.check_ptx(self.dtypes, cubins, CSRC))
        return found

    def _timed(self, name: str, function: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = function()
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - started
        return result

    def _gate(self, name: Gate, function: Callable[[], list[Outcome]]) -> None:
        found = self._timed(name, function)
        self.outcomes += found
        for outcome in found:
            if outcome.lines:
                self._table(f"{name}: {outcome.title}", outcome.columns, outcome.lines)
        checks = [check for outcome in found for check in outcome.checks]
        failures = [check for check in checks if not check.passed]
        self.out.print(f"{name}: {len(checks) - len(failures)} of {len(checks)} hold, {self.seconds[name]:.0f} s")
        for check in failures:
            self.out.print(f"  {check.subject} {check.what}", style="red", markup=False)

    def _plant(self) -> None:
        """Show each defect to its gate, if that one is asked for."""
        chosen = [
            defect
            for defect in planted.defects()
            if (defect.gate if defect.gate in GATES else "sanitized") in self.gates and (defect.quick or not self.quick)
        ]

        def show_all() -> list[Caught]:
            # What all defects of a build have in common is made before they run side by side.
            for name in dict.fromkeys(defect.gate for defect in chosen if defect.gate in VARIANTS):
                build(VARIANTS[name])
            return side_by_side(planted.show, chosen)

        self.caught = self._timed("planted defects", show_all)
        rows = [(c.defect.name, f"csrc/{c.defect.file}", c.defect.dtype, c.defect.gate,
                 escape(c.answer[:110] if c.caught else f"NOT CAUGHT: {c.answer}")) for c in self.caught]  # fmt: skip
        self._table("planted defects", ("defect", "file", "dtype", "shown to", "which says"), rows)

    def _table(self, title: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
        table = Table(*columns, title=title, title_justify="left")
        for line in lines:
            table.add_row(*line)
        self.out.print(table)

    def _close(self) -> bool:
        checks = [check for outcome in self.outcomes for check in outcome.checks]
        gates = [gate for gate in GATES if any(check.gate == gate for check in checks)]
        lines = [(family or "the library", dtype, *(_cell(checks, family, dtype, gate) for gate in gates))
                 for family, dtype in kinds(self.outcomes)]  # fmt: skip
        self._table("kernels x dtypes x gates: how many checks hold", ("kernels", "dtype", *gates), lines)
        failures = [check for check in checks if not check.passed]
        missed = [caught for caught in self.caught if not caught.caught]
        times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.seconds.items())
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = used.ru_utime + used.ru_stime
        self.out.print(f"{sum(self.seconds.values()):.0f} s, {cpu:.0f} s of processors: {times}")
        self.out.print(
            f"{len(checks) - len(failures)} checks hold, {len(failures)} fail; "
            f"{len(self.caught) - len(missed)} planted defects caught, {len(missed)} missed"
        )
        return not failures and not missed


def _cell(checks: Sequence[Check], family: str, dtype: str, gate: Gate) -> str:
    found = [check for check in checks if (check.family, check.dtype, check.gate) == (family, dtype, gate)]
    held = sum(check.passed for check in found)
    if not found:
        return ""
    return f"{held}" if held == len(found) else f"[red]{held} of {len(found)}[/]"


def main() -> None:
    """Run the gates that are asked for."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_proof", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=GATES, metavar="GATE", help=f"of {', '.join(GATES)}")
    parser.add_argument("--quick", action="store_true", help="the part that CI runs: see docs/gpu.md")
    parser.add_argument("--no-planted", action="store_true", help="plant no defects")
    options = parser.parse_args()
    usual = ("compiled", "read", "sanitized") if options.quick else GATES
    os.environ["FASTMLP_SANITIZE"] = ""
    proof = Proof(options.only or usual, options.quick, not options.no_planted)
    sys.exit(0 if proof.run() else 1)


if __name__ == "__main__":
    main()
