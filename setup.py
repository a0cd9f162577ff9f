"""Builds the extension fastmlp._C; all metadata stands in pyproject.toml.

FASTMLP_CUDA=auto (default), 0 or 1: with CUDA kernels if torch and a toolkit have CUDA; without; with them or an error.
They are compiled for the cards of this machine, for all architectures if it has none, or as TORCH_CUDA_ARCH_LIST says.
FASTMLP_SANITIZE=address,undefined: a build for tests, with these sanitizers of the compiler.
"""

import json
import os
import re
import subprocess
from functools import cache
from glob import glob
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension


def cuda_obstacle() -> str | None:
    """Why the CUDA kernels cannot be built here, or None."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if CUDA_HOME is None:
        return f"torch has CUDA {torch.version.cuda}, but no CUDA toolkit was found; CUDA_HOME names one"
    nvcc = Path(CUDA_HOME, "bin", "nvcc")
    if not nvcc.exists():
        return f"the CUDA toolkit in {CUDA_HOME} has no nvcc"
    answer = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.", answer)
    if found is None or found[1] != torch.version.cuda.split(".")[0]:
        release = "an unknown release" if found is None else f"release {found[1]}"
        return f"torch has CUDA {torch.version.cuda}, but the toolkit in {CUDA_HOME} is of {release}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (7, 5):
        return f"{torch.cuda.get_device_name()} is older than sm_75"
    return None


@cache
def wants_cuda() -> bool:
    """What FASTMLP_CUDA asks for, or an error if it cannot be had."""
    choice = os.environ.get("FASTMLP_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"FASTMLP_CUDA must be 0, 1 or auto, got {choice!r}")
    if choice == "0":
        return False
    obstacle = cuda_obstacle()
    if obstacle and choice == "1":
        raise SystemExit(f"FASTMLP_CUDA=1, but {obstacle}")
    return obstacle is None


def architectures() -> str:
    """What the kernels are compiled for: what TORCH_CUDA_ARCH_LIST says, the cards of this machine, or all.

    Of the newest there is PTX too, which newer cards compile; but not of sm_75, whose code lacks the products of
    bfloat16 on tensor cores that newer cards are asked for.
    """
    if (listed := os.environ.get("TORCH_CUDA_ARCH_LIST")) is not None:
        if re.search(r"\b7\.\d\+PTX|\bTuring\+PTX", listed):
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST={listed} asks for PTX of an architecture before 8.0, which lacks kernels that "
                "newer cards are asked for; leave +PTX to 8.0 or newer"
            )
        return listed
    if not torch.cuda.is_available():
        return "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
    # Of a card that is newer than torch, PTX of the newest that torch knows.
    known = max(int(n) for name in torch.cuda.get_arch_list() for n in re.findall(r"sm_(\d+)", name))
    cards = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    found = sorted({min(card, divmod(known, 10)) for card in cards})
    names = [f"{major}.{minor}" for major, minor in found]
    return ";".join(names) + ("+PTX" if found[-1] >= (8, 0) else "")


class Build(BuildExtension):
    """Writes beside the extension which torch it belongs to, for fastmlp/_load.py to check."""

    def run(self) -> None:
        """As BuildExtension, then the note."""
        super().run()
        info = {"torch": torch.__version__, "cuda": wants_cuda()}
        path = Path(self.get_ext_fullpath("fastmlp._C")).with_name("_build.json")
        path.write_text(json.dumps(info) + "\n", encoding="utf-8")


compile_flags = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
link_flags = ["-fopenmp"]
if sanitizers := os.environ.get("FASTMLP_SANITIZE"):
    flags = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
    compile_flags += ["-O1", "-g1", *flags]
    link_flags += flags
else:
    link_flags += ["-Wl,--strip-debug"]

#: What a build without CUDA kernels has in their place: it says how to build them.
ABSENT = "csrc/cuda/absent.cpp"
sources = {path for kind in ("cpp", "cu") for path in glob(f"csrc/**/*.{kind}", recursive=True)}

if wants_cuda():
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
    # activation.h is constexpr, which this flag lets device code call.
    nvcc_flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fvisibility=hidden"]
    extension = CUDAExtension(
        "fastmlp._C",
        sorted(sources - {ABSENT}),
        extra_compile_args={"cxx": compile_flags, "nvcc": nvcc_flags},
        extra_link_args=link_flags,
    )
else:
    extension = CppExtension(
        "fastmlp._C",
        sorted(sources - set(glob("csrc/cuda/**", recursive=True)) | {ABSENT}),
        extra_compile_args=compile_flags,
        extra_link_args=link_flags,
    )

setup(ext_modules=[extension], cmdclass={"build_ext": Build})
