"""Targets that are not the speed of one workload: threads, memory, the cost of having the library, growth."""

import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getpagesize, getrusage
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import fastmlp
from benchmarks.contenders.pytorch import Fastmlp
from benchmarks.machine import describe, multiply_adds
from benchmarks.targets import PARALLEL, Outcome, find
from benchmarks.workloads import NARROW
from fastmlp import _C
from fastmlp.benchmark.machine import dtype_name
from fastmlp.benchmark.timing import Effort, race, ratio

MIB = 1 << 20

#: Memory that one block of rows may take, whatever their number.
BLOCK = 2 * MIB


#: Chunks into which a weight gradient's sum over the batch may be cut, each with a sum of its own.
CHUNKS = 16

#: How much longer than one core two may take for twice the work, if no one else is to be there.
BUSY = 1.1

#: Undisturbed rounds that make a figure.
QUIET = 3

ROWS = 65536
PACKAGE = Path(fastmlp.__file__).parent


def threads(effort: Effort) -> Iterator[Outcome]:
    """Time two threads against one, P12."""
    goal = 1.85
    words = ("P12", "two threads against one", f">= {goal:.2f} x")
    if len(os.sched_getaffinity(0)) < 2:
        yield Outcome(*words, "not measured: the process may use one core only", None, "")
        return
    found = {}
    workloads = find(PARALLEL)
    with ThreadPoolExecutor(2) as pool:
        for workload in workloads:
            call = Fastmlp(workload).call
            calls = {str(n): partial(_with_threads, n, call) for n in (1, 2)}
            calls |= {f"idle {n}": partial(_multiply, pool, n) for n in (1, 2)}
            samples = race(calls, effort)
            rounds = zip(*(samples[name] for name in calls), strict=True)
            quiet = [one / two for one, two, alone, both in rounds if both < BUSY * alone]
            if len(quiet) >= QUIET:
                found[workload.name] = median(quiet)
    torch.set_num_threads(1)
    disturbed = f"; {len(workloads) - len(found)} of {len(workloads)} disturbed" if len(found) < len(workloads) else ""
    if not found:
        yield Outcome(*words, "not measured: one of the cores had other work", None, "")
        return
    worst = min(found, key=lambda name: found[name])
    met = sum(value >= goal for value in found.values())
    measured = f"{found[worst]:.2f}, {met} of {len(found)} met{disturbed}"
    yield Outcome(*words, measured, None if disturbed and met == len(found) else met == len(found), worst)


def _with_threads(number: int, call: Callable[[], Any]) -> None:
    torch.set_num_threads(number)
    call()


def _multiply(pool: Executor, number: int) -> None:
    """Keep this many cores busy for a millisecond: if they are free, two take no longer than one."""
    work = multiply_adds(torch.float32)
    for future in [pool.submit(lambda: [work() for _ in range(5)]) for _ in range(number)]:
        future.result()


@dataclass(frozen=True)
class Use:
    """Memory that a call took.

    Attributes:
        peak: bytes at most, during the call, beyond those before it.
        kept: bytes beyond those before it once it has returned.
        faults: pages that the system had to provide.
    """

    peak: int
    kept: int
    faults: int


def memory() -> Iterator[Outcome]:
    """Measure memory, P13, in a fresh process for each case."""
    words = "narrow layer, inference", f"<= output + {BLOCK // MIB} MiB"
    if not Path("/proc/self/clear_refs").exists():
        yield Outcome("P13", *words, "not measured: needs Linux's /proc/self/clear_refs", None, "")
        return
    output = ROWS * 64 * 4
    use = _alone(_use_of_inference, (64, 64))
    yield _memory(*words, use.peak, output, output + BLOCK, use.faults, f"{ROWS}x64x64")
    result = ROWS * NARROW.widths[-1] * 4
    use = _alone(_use_of_inference, NARROW.widths)
    words, most = ("narrow network, inference", f"<= output + {BLOCK // MIB} MiB"), result + BLOCK
    yield _memory(*words, use.peak, result, most, use.faults, f"{NARROW.name} b{ROWS}")
    use = _alone(_use_of_forward, (64, 64))
    words = "narrow layer, kept for backward", "<= output + 5 %"
    yield _memory(*words, use.kept, output, output * 1.05, use.faults, f"{ROWS}x64x64")
    outputs = ROWS * sum(NARROW.widths[1:]) * 4
    use = _alone(_use_of_forward, NARROW.widths)
    words = "narrow network, kept for backward", "<= outputs + 5 %"
    yield _memory(*words, use.kept, outputs, outputs * 1.05, use.faults, f"{NARROW.name} b{ROWS}")
    for width in (64, 256):
        gradient = width * width * 4
        words = "weight gradient", f"<= {CHUNKS} gradients + {BLOCK // MIB} MiB"
        use = _alone(_use_of_weight_gradient, width)
        yield _memory(*words, use.peak, gradient, CHUNKS * gradient + BLOCK, use.faults, f"{ROWS}x{width}x{width}")


def _memory(what: str, goal: str, used: int, unit: int, most: float, faults: int, where: str) -> Outcome:
    measured = f"{used / MIB:.2f} MiB, of {unit / MIB:.2f}; {faults} page faults of {getpagesize()} bytes"
    return Outcome("P13", what, goal, measured, used <= most, where)


def _alone(measure: Callable[..., Use], *arguments: Any) -> Use:
    """Measure in a process of its own, in whose memory no gaps from earlier work can be filled."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def _use_of_inference(widths: Sequence[int]) -> Use:
    model, input = fastmlp.MLP(widths[0], widths[1:-1], widths[-1]), torch.randn(ROWS, widths[0])
    with torch.no_grad():
        model(input[:64])  # so that what is made once, code included, is there
        return _use(lambda: model(input))


def _use_of_forward(widths: Sequence[int]) -> Use:
    model, input = fastmlp.MLP(widths[0], widths[1:-1], widths[-1]), torch.randn(ROWS, widths[0])
    model(input[:64])
    return _use(lambda: model(input))


def _use_of_weight_gradient(width: int) -> Use:
    layer, input, grad = (
        fastmlp.Linear(width, width, activation="relu"),
        torch.randn(ROWS, width),
        torch.randn(ROWS, width),
    )
    layer(input[:64]).backward(grad[:64])
    layer.zero_grad()
    output = layer(input)
    return _use(lambda: output.backward(grad))


def _use(call: Callable[[], Tensor | None]) -> Use:
    torch.set_num_threads(1)
    before, faults = resident("VmRSS"), getrusage(RUSAGE_SELF).ru_minflt
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is there now
    result = call()
    faults = getrusage(RUSAGE_SELF).ru_minflt - faults
    use = Use(resident("VmHWM") - before, resident("VmRSS") - before, faults)
    del result  # which had to live until now
    return use


def resident(key: str) -> int:
    """Return a number of bytes of /proc/self/status: of "VmRSS" memory that the process has, of "VmHWM" its most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith(key + ":")]
    return int(value) * 1024


def overhead(build: bool) -> Iterator[Outcome]:
    """Measure what it takes to have the library, P14.

    Args:
        build: whether to compile it, which takes minutes of all cores.
    """
    code = "import time, torch; start = time.perf_counter(); import fastmlp; print(time.perf_counter() - start)"
    added = median(float(_output_of([sys.executable, "-c", code])) for _ in range(5))
    yield Outcome(
        "P14", "import, beyond torch's", "<= 0.15 s", f"{added:.3f} s", added <= 0.15, "median of 5 processes"
    )
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as wheel:
        for path in PACKAGE.rglob("*"):
            if path.suffix in (".py", ".pyi", ".so", ".json", ".typed"):
                wheel.write(path)
    size = packed.tell() / MIB
    yield Outcome("P14", "wheel", "<= 10 MiB", f"{size:.2f} MiB", size <= 10, "the package's files, compressed")
    words = ("P14", "build on 2 cores", "<= 4 min")
    if not build:
        yield Outcome(*words, "not measured: takes --build", None, "")
        return
    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder]
        _output_of(command, cwd=PACKAGE.parent)
        minutes = (perf_counter() - start) / 60
    cores = len(os.sched_getaffinity(0))
    yield Outcome(*words, f"{minutes:.1f} min", minutes <= 4, f"{cores} core{'s' if cores > 1 else ''}")


def _output_of(command: Sequence[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def growth(effort: Effort) -> Iterator[Outcome]:
    """Measure how time grows with the work, P15."""
    describe(1)
    batches = [4096 << step for step in range(0, 9, 2)]
    fan_in, *hidden, fan_out = NARROW.widths
    model = fastmlp.MLP(fan_in, hidden, fan_out)
    inputs = torch.randn(batches[-1], fan_in)
    with torch.no_grad():
        samples = race({str(n): partial(model, inputs[:n]) for n in batches}, effort)
    first = samples[str(batches[0])]
    per_row = {n: ratio(samples[str(n)], first) * batches[0] / n for n in batches}
    spread = max(per_row.values()) / min(per_row.values())
    slowest = max(per_row, key=lambda n: per_row[n])
    what = f"narrow network, inference: time for a row, {batches[0]} to {batches[-1]} rows"
    yield Outcome("P15", what, "within 10 %", f"within {spread - 1:.0%}", spread <= 1.1, f"slowest at {slowest}")
    isa = next(isa for isa in _C.instruction_sets() if isa["name"] == fastmlp.get_isa())
    for name, sizes in isa.items():
        if isinstance(sizes, dict):
            yield _tile_edge(getattr(torch, name), sizes["MR"], sizes["NR"], effort)


def _tile_edge(dtype: torch.dtype, tile_rows: int, tile_columns: int, effort: Effort) -> Outcome:
    """Time products that just fill register tiles against those with a row or a column more."""
    steps: dict[str, float] = {}
    for tiles in (8, 16):
        rows, columns, depth = tiles * tile_rows, tiles * tile_columns, 256
        input = torch.randn(rows + 1, depth, dtype=dtype)
        weight = torch.randn(columns + 1, depth, dtype=dtype)
        shapes = [(rows, columns), (rows + 1, columns), (rows, columns + 1)]
        calls = {shape: partial(fastmlp.functional.linear, input[: shape[0]], weight[: shape[1]]) for shape in shapes}
        with torch.no_grad():
            samples = race({f"{m}x{n}x{depth}": call for (m, n), call in calls.items()}, effort)
        full, *beyond = samples
        for (m, n), case in zip(shapes[1:], beyond, strict=True):
            steps[case] = ratio(samples[case], samples[full]) * rows * columns / (m * n)
    worst = max(steps, key=lambda case: steps[case])
    what = f"{dtype_name(dtype)} products, a step beyond {tile_rows} x {tile_columns} tiles: time for an element"
    measured = f"{steps[worst] - 1:+.0%}, {sum(step <= 1.15 for step in steps.values())} of {len(steps)} met"
    return Outcome("P15", what, "<= +15 %", measured, steps[worst] <= 1.15, worst)
