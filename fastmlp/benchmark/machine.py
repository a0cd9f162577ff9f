"""What figures are measured on, and what makes them repeatable."""

import ctypes
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastmlp

__all__ = ["about", "dtype_name", "keep_memory", "processor"]


def about(packages: tuple[str, ...] = ()) -> dict[str, str]:
    """What a report says of where and when it was measured.

    Args:
        packages: distributions whose versions belong to it, where they are installed.

    Example:
        >>> sorted(about())
        ['cores', 'date', 'fastmlp', 'instruction set', 'processor', 'python', 'system', 'threads', 'torch']
    """
    found = {
        "fastmlp": fastmlp.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1),
        "system": platform.platform(),
        "threads": str(torch.get_num_threads()),
        "instruction set": fastmlp.get_isa(),
    }
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """Its name without the module.

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def keep_memory() -> None:
    """Lets freed memory stay with the process.

    By default glibc returns large blocks to the system or not, as the process's history has it, and a
    large output then costs its page faults at every call or at none: 65536x3x64 took eager 3 or 20 ms.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large allocation
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back the end of the heap


def processor() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
