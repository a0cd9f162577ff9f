"""What a figure was measured on."""

import ctypes
import platform
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import perf_counter

import torch

import fastmlp


@dataclass(frozen=True)
class Machine:
    """Hardware and software, as far as they matter to a figure.

    Attributes:
        threads: of PyTorch, which fastmlp obeys.
        isa: whose kernels fastmlp runs.
        fastmlp: its version.
        torch: its version.
        cpu: the processor's name.
        best_mm_gflops: the best rate seen of `torch.mm`. It stands in for the processor's peak, which
            takes a compiler to measure, and of which a good product of matrices misses 10 to 25 percent.
    """

    threads: int
    isa: str
    fastmlp: str
    torch: str
    cpu: str
    best_mm_gflops: float

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{threads}, {self.isa}, fastmlp {self.fastmlp}, torch {self.torch}, {self.cpu}"


@lru_cache(maxsize=1)
def describe(threads: int) -> Machine:
    """Make measurements repeatable, set the number of threads, and describe what runs.

    Args:
        threads: at least 1.
    """
    _keep_memory()
    torch.set_num_threads(threads)
    best = max(_mm(n) for n in (256, 512, 1024))
    return Machine(threads, fastmlp.get_isa(), fastmlp.__version__, torch.__version__, _processor(), round(best, 1))


def _keep_memory() -> None:
    """Let freed memory stay with the process.

    By default glibc returns large blocks to the system or not, as the process's history has it, and a
    large output then costs its page faults at every call or at none: 65536x3x64 took eager 3 or 20 ms.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large allocation
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back the end of the heap


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _mm(n: int) -> float:
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    best = float("inf")
    end = perf_counter() + 0.3
    while (start := perf_counter()) < end:
        torch.mm(a, b, out=out)
        best = min(best, perf_counter() - start)
    return 2 * n**3 / best / 1e9
