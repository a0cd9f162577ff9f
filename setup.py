"""Builds the extension fastmlp._C; all metadata stands in pyproject.toml.

FASTMLP_CUDA=0, 1 or auto (default): with CUDA kernels if torch and a toolkit have CUDA.
FASTMLP_SANITIZE=address,undefined: a build for tests, with these sanitizers of the compiler.
"""

import json
import os
from glob import glob
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension


def wants_cuda() -> bool:
    """What FASTMLP_CUDA asks for, or an error if it cannot be had."""
    choice = os.environ.get("FASTMLP_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise SystemExit(f"FASTMLP_CUDA must be 0, 1 or auto, got {choice!r}")
    sources = glob("csrc/cuda/*.cu")
    if choice == "1" and not sources:
        raise SystemExit("FASTMLP_CUDA=1, but this version of fastmlp has no CUDA kernels yet")
    return choice != "0" and bool(sources)


class Build(BuildExtension):
    """Writes beside the extension which torch it belongs to, for fastmlp/_load.py to check."""

    def run(self) -> None:
        """As BuildExtension, then the note."""
        super().run()
        info = {"torch": torch.__version__, "cuda": wants_cuda()}
        path = Path(self.get_ext_fullpath("fastmlp._C")).with_name("_build.json")
        path.write_text(json.dumps(info) + "\n", encoding="utf-8")


compile_flags = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
link_flags = ["-fopenmp"]
if sanitizers := os.environ.get("FASTMLP_SANITIZE"):
    flags = [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined"]
    compile_flags += ["-O1", "-g1", *flags]
    link_flags += flags
else:
    link_flags += ["-Wl,--strip-debug"]

setup(
    ext_modules=[
        CppExtension(
            "fastmlp._C",
            sorted(glob("csrc/**/*.cpp", recursive=True)),
            extra_compile_args=compile_flags,
            extra_link_args=link_flags,
        )
    ],
    cmdclass={"build_ext": Build},
)
