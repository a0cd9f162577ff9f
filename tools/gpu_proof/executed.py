"""Gate `executed`: tests/cuda/test_cuda_kernels.py in the emulator, which must run every kernel that nvcc compiles."""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from tools.gpu_proof.checks import Check, Outcome
from tools.gpu_proof.emulation import COVERAGE, build, execute
from tools.gpu_proof.kernels import Kernel, demangle
from tools.gpu_proof.toolchain import BUILD, run

TESTS = "tests/cuda/test_cuda_kernels.py"


def counts(folder: Path) -> tuple[dict[str, int], dict[str, dict[int, int]]]:
    """Return how often functions ran, by mangled name, and lines of csrc/cuda, by file, as gcov counted them."""
    functions: dict[str, int] = defaultdict(int)
    lines: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for data in sorted((BUILD / "objects").glob("*.gcda")):
        run(["gcov", "--json-format", data], cwd=folder)
    for report in sorted(folder.glob("*.gcov.json.gz")):
        for file in json.loads(gzip.decompress(report.read_bytes()))["files"]:
            if "/csrc/cuda/" not in file["file"]:
                continue
            for function in file["functions"]:
                functions[function["name"]] += function["execution_count"]
            for line in file["lines"]:
                lines[file["file"].split("/csrc/")[1]][line["line_number"]] += line["count"]
    return functions, lines


def check(compiled: Collection[Kernel]) -> Outcome:
    """Run the tests with counters; every one of the compiled kernels must have run, and no test may fail."""
    outcome = Outcome(columns=("file", "lines", "ran"), title=f"lines of csrc/cuda that {TESTS} runs")
    for old in (BUILD / "objects").glob("*.gcda"):
        old.unlink()
    folder = BUILD / "gcov"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    done = execute(build(COVERAGE), COVERAGE, ["-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS], seconds=3600)
    closing = done.stdout.rstrip().splitlines()[-1] if done.stdout.strip() else "nothing"
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.MULTILINE)
    outcome.checks.append(Check("executed", "", "", TESTS, "; ".join([closing, *failed[:8]]), done.returncode == 0))
    functions, lines = counts(folder)
    ran = {kernel for mangled, kernel in demangle(n for n, count in functions.items() if count > 0).items()}
    for kernel in sorted(compiled):
        what = f"{kernel}: {'ran' if kernel in ran else 'was never run'}"
        outcome.checks.append(Check("executed", kernel.family, kernel.dtype, "emulator", what, kernel in ran))
    for name, found in sorted(lines.items()):
        outcome.lines.append((name, str(len(found)), f"{sum(n > 0 for n in found.values()) / len(found):.1%}"))
    return outcome
