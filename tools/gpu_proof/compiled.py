"""Gate `compiled`: no kernel spills, and each keeps within the registers and shared memory of budget.toml."""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from tools.gpu_proof.checks import Check, Outcome
from tools.gpu_proof.kernels import Kernel, demangle
from tools.gpu_proof.toolchain import BUILD, CommandError, digest, nvcc_version, run, side_by_side, tool

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
DTYPES = ("float32", "float64", "bfloat16", "float16")

#: As setup.py has them, but for one architecture at a time.
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr")


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel."""

    registers: int
    shared: int  # bytes, static
    stack: int
    stored: int  # bytes spilled
    loaded: int

    @property
    def spills(self) -> bool:
        """Return whether registers go to memory."""
        return self.stored + self.loaded > 0


@dataclass(frozen=True)
class Cubin:
    """One dtype's kernels for one architecture."""

    dtype: str
    architecture: int
    path: Path
    usage: Mapping[str, Usage]  # by mangled name

    @property
    def where(self) -> str:
        """Return the architecture as compilers name it."""
        return f"sm_{self.architecture}"


@cache
def budget(section: str) -> tuple[Mapping[str, Any], ...]:
    """Return the rules of one section of budget.toml."""
    return tuple(tomllib.loads(Path(__file__).with_name("budget.toml").read_text())[section])


def rule_of(section: str, kernel: Kernel, architecture: int) -> Mapping[str, Any] | None:
    """Return the first rule for a kernel on an architecture."""
    for rule in budget(section):
        if fnmatch(str(kernel), rule["kernel"]) and architecture in rule.get("architectures", ARCHITECTURES):
            return rule
    return None


def read_usage(text: str) -> dict[str, Usage]:
    """Read what `ptxas -v` prints; what functions that a kernel calls spill counts as the kernel's."""
    found: dict[str, Usage] = {}
    for part in re.split(r"Compiling entry function '", text)[1:]:
        name = part.split("'", 1)[0]
        stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if not stacks or registers is None:
            raise CommandError(f"ptxas said nothing of the registers of {name}")
        shared = re.search(r"(\d+) bytes smem", part)
        stack, stored, loaded = (sum(map(int, column)) for column in zip(*stacks, strict=True))
        found[name] = Usage(int(registers[1]), int(shared[1]) if shared else 0, stack, stored, loaded)
    return found


def sources(folder: Path) -> list[Path]:
    """Return all that a kernel is compiled from."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".h", ".cuh", ".cu"))


def compile_cubin(dtype: str, architecture: int, csrc: Path, name: str = "") -> Cubin:
    """Compile one dtype for one architecture, unless what it is compiled from is as it was."""
    folder = BUILD / "cubins"
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}{dtype}_sm_{architecture}"
    key = digest(nvcc_version(), *FLAGS, *sources(csrc))
    cubin, log = folder / f"{stem}_{key}.cubin", folder / f"{stem}_{key}.ptxas"
    if not log.exists():
        for old in folder.glob(f"{stem}_*"):
            old.unlink()
        source = csrc / f"cuda/dtypes/{dtype}.cu"
        arguments = ("-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-o", cubin, source)
        said = run([tool("nvcc"), *FLAGS, *arguments])
        log.write_text(said)
    return Cubin(dtype, architecture, cubin, read_usage(log.read_text()))


def check_ptx(dtypes: Sequence[str], cubins: Iterable[Cubin], csrc: Path) -> Outcome:
    """Compile to PTX of the newest architecture, which has every kernel that its machine code has."""
    newest = max(ARCHITECTURES)
    expected = {cubin.dtype: len(cubin.usage) for cubin in cubins if cubin.architecture == newest}

    def count(dtype: str) -> int:
        # A file: nvcc lets ptxas check what it wrote.
        ptx = BUILD / "cubins" / f"{dtype}_compute_{newest}.ptx"
        run([tool("nvcc"), *FLAGS, "-ptx", f"-arch=compute_{newest}", "-o", ptx, csrc / f"cuda/dtypes/{dtype}.cu"])
        return ptx.read_text().count(".visible .entry ")

    outcome = Outcome()
    for dtype, found in zip(dtypes, side_by_side(count, dtypes), strict=True):
        passed = found == expected[dtype]
        outcome.checks.append(Check("compiled", "", dtype, f"compute_{newest}", f"PTX of {found} kernels", passed))
    return outcome


def check_cubins(cubins: Iterable[Cubin]) -> Outcome:
    """Hold what ptxas says of each kernel against the budget."""
    outcome = Outcome(title="registers, bytes of shared memory, bytes spilled (stored/loaded), by architecture")
    for cubin in cubins:
        for mangled, kernel in demangle(cubin.usage).items():
            outcome.checks.append(_check(kernel, cubin, cubin.usage[mangled]))
    return outcome


def _check(kernel: Kernel, cubin: Cubin, usage: Usage) -> Check:
    rule = rule_of("compiled", kernel, cubin.architecture)
    wrong = []
    if usage.spills:
        wrong.append(f"spills {usage.stored}/{usage.loaded} bytes")
    if rule is None:
        wrong.append("has no budget")
    else:
        for name, used in (("registers", usage.registers), ("shared", usage.shared)):
            if used > rule[name]:
                wrong.append(f"{used} {name}, budget {rule[name]}")
    what = f"{kernel}: {', '.join(wrong) or f'{usage.registers} registers, {usage.shared} bytes shared'}"
    return Check("compiled", kernel.family, kernel.dtype, cubin.where, what, not wrong)


def table(cubins: Sequence[Cubin]) -> tuple[list[str], list[list[str]]]:
    """Return head and lines of the table of what each kernel uses, an architecture a column."""
    columns = [cubin.where for cubin in cubins if cubin.dtype == cubins[0].dtype]
    cells: dict[Kernel, dict[str, str]] = {}
    for cubin in cubins:
        for mangled, kernel in demangle(cubin.usage).items():
            usage = cubin.usage[mangled]
            spilled = f" [red]spills {usage.stored}/{usage.loaded}[/]" if usage.spills else ""
            cells.setdefault(kernel, {})[cubin.where] = f"{usage.registers} {usage.shared}{spilled}"
    return columns, [[str(kernel), *(row.get(c, "") for c in columns)] for kernel, row in sorted(cells.items())]


def compile_all(dtypes: Iterable[str], architectures: Iterable[int], csrc: Path) -> list[Cubin]:
    """Compile every dtype for every architecture."""
    pairs = [(dtype, architecture) for dtype in dtypes for architecture in architectures]
    return side_by_side(lambda pair: compile_cubin(*pair, csrc), pairs)
