"""Builds and loads `_C_emulated`: the CUDA kernels, run on CPU tensors by tests/emulator.

FASTMLP_SANITIZE=address,undefined (or thread): build it with these sanitizers of the compiler.
FASTMLP_EMULATED=/path/_C_emulated.so: load this library, which tools/gpu_proof has built, and build nothing.
"""

import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

from torch.utils.cpp_extension import load

from tests.support.emulator_sources import HOST_SOURCES
from tests.support.kernel_checks import KernelChecks

ROOT = Path(__file__).parents[2]
#: The host compiler fuses a * b + c because nvcc does, so that sums of products have the same bits. Loops are not
#: vectorised, because gcc's vectors multiply first and add afterwards.
FUSED = ["-mfma", "-mf16c", "-ffp-contract=fast", "-fno-tree-vectorize"]


@cache
def emulated() -> Any:
    """The extension; compiled at the first call, and again when a source has changed."""
    if built := os.environ.get("FASTMLP_EMULATED"):
        spec = importlib.util.spec_from_file_location("_C_emulated", built)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    sanitizers = os.environ.get("FASTMLP_SANITIZE")
    sanitize = [f"-fsanitize={sanitizers}", "-g1"] if sanitizers else ["-g0"]
    folder = ROOT / "build" / ("emulated" + (f"_{sanitizers}" if sanitizers else ""))
    folder.mkdir(parents=True, exist_ok=True)
    sources = [*sorted((ROOT / "tests/emulator/extension").glob("*.cpp")), *HOST_SOURCES]
    return load(
        "_C_emulated",
        [str(source) for source in sources],
        extra_include_paths=[str(ROOT / "csrc"), str(ROOT / "tests/emulator")],
        extra_cflags=["-O2", *FUSED, *sanitize, "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"],
        extra_ldflags=sanitize,
        build_directory=str(folder),
    )


#: The orders in which the threads of a block may run between barriers; a number is a seed.
ORDERS = ("fifo", "lifo", "1", "2")

checks = KernelChecks(emulated, "cpu")


def set_up(architecture: int = 80, tile: int = -1, order: str = "fifo", fuses: bool = True) -> None:
    """Sets what the next passes run with; with tile -1 the static table chooses."""
    emulated().set_up(architecture, tile, order, fuses)
