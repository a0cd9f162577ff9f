"""Builds and loads `_C_emulated`: the CUDA kernels, run on CPU tensors by tests/emulator."""

from functools import cache
from pathlib import Path
from typing import Any

from torch.utils.cpp_extension import load

ROOT = Path(__file__).parent.parent


@cache
def emulated() -> Any:
    """The extension; compiled at the first call, and again when a source has changed."""
    folder = ROOT / "build" / "emulated"
    folder.mkdir(parents=True, exist_ok=True)
    sources = [
        *sorted((ROOT / "tests/emulator/extension").glob("*.cpp")),
        *(ROOT / "csrc" / name for name in ("activation_info.cpp", "checks.cpp", "passes.cpp", "stack.cpp")),
    ]
    return load(
        "_C_emulated",
        [str(source) for source in sources],
        extra_include_paths=[str(ROOT / "csrc"), str(ROOT / "tests/emulator")],
        extra_cflags=["-std=c++20", "-O2", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"],
        build_directory=str(folder),
    )
