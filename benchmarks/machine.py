"""What a figure was measured on, and what that could reach at most."""

import ctypes
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import sha256
from pathlib import Path
from shutil import which
from time import perf_counter

import torch

import fastmlp
from fastmlp.benchmark.machine import dtype_name, keep_memory, processor

SOURCE = Path(__file__).with_name("peak.c")
CACHE = SOURCE.parents[1] / "build" / "benchmarks"

#: Seconds for which each limit is sought.
EFFORT = 0.3

#: More than any cache holds.
STREAM = 1 << 28


@dataclass(frozen=True)
class Machine:
    """Hardware and software, as far as they matter to a figure.

    Attributes:
        threads: of PyTorch, which all contenders obey.
        isa: whose kernels fastmlp runs.
        fastmlp: its version.
        torch: its version.
        cpu: the processor's name.
        peak_gflops: by dtype, the rate of multiply-adds on registers of one core, in 1e9 operations per
            second. Types without such an instruction have float32's.
        read_gbytes: the rate at which one core reads memory, in 1e9 bytes per second.
    """

    threads: int
    isa: str
    fastmlp: str
    torch: str
    cpu: str
    peak_gflops: dict[str, float]
    read_gbytes: float

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{threads}, {self.isa}, fastmlp {self.fastmlp}, torch {self.torch}, {self.cpu}"

    @property
    def limits(self) -> str:
        """The peaks in words."""
        peaks = ", ".join(f"{name} {rate:.0f}" for name, rate in self.peak_gflops.items())
        return f"peak of one core, GFLOP/s: {peaks}; it reads {self.read_gbytes:.1f} GB/s"


@lru_cache(maxsize=1)
def describe(threads: int) -> Machine:
    """Make measurements repeatable, set the number of threads, and describe what runs.

    Args:
        threads: at least 1.
    """
    keep_memory()
    torch.set_num_threads(threads)
    peaks = {dtype_name(dtype): round(peak(dtype), 1) for dtype in (torch.float32, torch.float64, torch.bfloat16)}
    isa, versions = fastmlp.get_isa(), (fastmlp.__version__, torch.__version__)
    return Machine(threads, isa, *versions, processor(), peaks, round(_read_rate(), 1))


@cache
def peak(dtype: torch.dtype) -> float:
    """Return the most multiply-adds that one core does, in 1e9 operations per second: two for each."""
    return _best(multiply_adds(dtype))


@cache
def multiply_adds(dtype: torch.dtype) -> Callable[[], float]:
    """Return a function that multiplies and adds for some 0.2 ms, and returns the number of operations.

    Args:
        dtype: of the factors. Without an instruction of its own, as float16 on most processors, it is
            float32 that is multiplied.
    """
    work = getattr(_library(), dtype_name(dtype), None) or _library().float32
    work.restype, work.argtypes = ctypes.c_double, [ctypes.c_long]
    return lambda: work(60000)  # beside which the call itself is nothing


def _read_rate() -> float:
    work = _library().read_memory
    work.restype, work.argtypes = ctypes.c_double, [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
    data = torch.zeros(STREAM + 64, dtype=torch.uint8)
    start = -data.data_ptr() % 64
    step = 12 * 64  # a multiple of what one iteration reads, whatever the width of a vector
    return _best(lambda: work(data.data_ptr() + start, STREAM // step * step, 1))


def _best(work: Callable[[], float]) -> float:
    """Return the highest rate of some work that returns how much it did, in 1e9 per second."""
    best = 0.0
    end = perf_counter() + EFFORT
    while (start := perf_counter()) < end:
        done = work()
        best = max(best, done / (perf_counter() - start) / 1e9)
    return best


@cache
def _library() -> ctypes.CDLL:
    """Compile peak.c for this processor, unless that has been done."""
    compiler = os.environ.get("CC", "cc")
    if not which(compiler):
        raise RuntimeError(
            f"the processor's peak is measured by {SOURCE.name}, for which a C compiler is needed: CC is "
            f"{compiler!r}, which was not found; install gcc or clang, or set CC to one"
        )
    command = [compiler, "-O2", "-march=native", "-shared", "-fPIC"]
    key = sha256(" ".join((*command, processor(), SOURCE.read_text(encoding="utf-8"))).encode())
    path = CACHE / f"peak-{key.hexdigest()[:16]}.so"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*command, "-o", str(unfinished), str(SOURCE)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{compiler} could not compile {SOURCE}:\n{done.stderr}")
        unfinished.replace(path)
    return ctypes.CDLL(str(path))
