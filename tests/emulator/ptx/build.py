"""From csrc/cuda by nvcc to PTX, to C++, to libraries that `_C_emulated` runs kernels of."""

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from tests.emulator.ptx.names import launches
from tests.emulator.ptx.translate import Kernel, translate
from tests.support.emulated import ROOT, emulated

BUILD = ROOT / "build" / "ptx"
DTYPES = ("float32", "float64", "bfloat16", "float16")
#: As setup.py compiles the kernels; lines of the CUDA source for the memory profile.
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo", "-ptx"]
#: Products and sums are fused where the PTX says so, and nowhere else.
CXX_FLAGS = ["-std=c++20", "-O1", "-finline-small-functions", "-mfma", "-mf16c", "-ffp-contract=off", "-fPIC", "-w"]


def nvcc() -> Path:
    """Of CUDA_HOME, of the packages of the extra gpu-proof, or of the path."""
    candidates = []
    if home := os.environ.get("CUDA_HOME"):
        candidates.append(Path(home, "bin", "nvcc"))
    if (package := find_spec("nvidia")) and package.submodule_search_locations:
        candidates += [Path(p, "cu13", "bin", "nvcc") for p in package.submodule_search_locations]
    if found := which("nvcc"):
        candidates.append(Path(found))
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise RuntimeError(
        "no nvcc: set CUDA_HOME to a toolkit of CUDA 13, or install the packages of the extra gpu-proof "
        "(nvidia-cuda-nvcc and others from PyPI)"
    )


def run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")


def digest(*parts: str | bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.encode() if isinstance(part, str) else part)
    return whole.hexdigest()[:16]


def contents(folder: Path) -> bytes:
    """Of all files of C++ and CUDA in a folder."""
    endings = {".h", ".cuh", ".cu"}
    return b"".join(f.read_bytes() for f in sorted(folder.rglob("*")) if f.suffix in endings)


def ptx_of(dtype: str, architecture: int, csrc: Path = ROOT / "csrc") -> str:
    """The PTX of a dtype's kernels; kept until anything in `csrc` changes."""
    source = csrc / f"cuda/dtypes/{dtype}.cu"
    key = digest(contents(csrc), str(NVCC_FLAGS), str(nvcc()))
    output = BUILD / f"{dtype}_{architecture}_{key}.ptx"
    if not output.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(f".{os.getpid()}")
        run([str(nvcc()), *NVCC_FLAGS, f"-arch=compute_{architecture}", "-o", str(partial), str(source)])
        partial.replace(output)
    return output.read_text(encoding="utf-8")


def flags() -> list[str]:
    sanitizers = os.environ.get("FASTMLP_SANITIZE")
    include = [f"-I{ROOT / folder}" for folder in ("csrc", "tests/emulator", "tests/emulator/ptx")]
    return [*CXX_FLAGS, *([f"-fsanitize={sanitizers}"] if sanitizers else []), *include]


def compile_cxx(command: list[str], output: Path) -> None:
    """Whoever finds the output finds it whole."""
    partial = output.with_suffix(f".{os.getpid()}")
    run(["g++", *flags(), *command, "-o", str(partial)])
    partial.replace(output)


@cache
def workplace() -> Path:
    """A folder for what is compiled with the emulator as it is, with semantics.h precompiled."""
    headers = contents(ROOT / "tests/emulator") + (ROOT / "csrc/contract/problem.h").read_bytes()
    folder = BUILD / digest(headers, str(flags()))
    precompiled = folder / "semantics.h.gch"
    if not precompiled.exists():
        folder.mkdir(parents=True, exist_ok=True)
        compile_cxx(["-x", "c++-header", str(ROOT / "tests/emulator/ptx/semantics.h")], precompiled)
    return folder


def library(kernel: Kernel) -> Path:
    """Compiled; kept as long as its text and the emulator stay."""
    output = workplace() / f"{digest(kernel.text)}.so"
    if not output.exists():
        text = output.with_suffix(".cpp")
        text.write_text(kernel.text, encoding="utf-8")
        compile_cxx(["-shared", str(text)], output)
    return output


def compile_all(kernels: Iterable[Kernel]) -> list[Path]:
    """Side by side, as many as MAX_JOBS says, or as there are processors."""
    workplace()
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        return list(pool.map(library, kernels))


def load_all(kernels: list[Kernel]) -> dict[str, Kernel]:
    """By mangled name."""
    emulated()  # the emulator of all libraries
    for path in compile_all(kernels):
        ctypes.CDLL(str(path))
    return {k.name: k for k in kernels}


def load(architecture: int, dtype: str) -> dict[str, Kernel]:
    """Builds the kernels that csrc/cuda launches for a dtype, and loads them into `_C_emulated`; by mangled name.

    Args:
        architecture: 80 for compute_80.
    """
    return load_all([k for k in translate(ptx_of(dtype, architecture)) if launches(k.name, architecture)])
