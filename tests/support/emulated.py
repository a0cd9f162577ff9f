"""Builds and loads `_C_emulated`: the CUDA kernels, run on CPU tensors by tests/emulator.

FASTMLP_SANITIZE=address,undefined (or thread): with these sanitizers of the compiler.
FASTMLP_EMULATED=/path/_C_emulated.so: this one, which tools/gpu_proof has built.
"""

import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

from torch.utils.cpp_extension import load

ROOT = Path(__file__).parents[2]
#: nvcc fuses a * b + c, so the host compiler does too: sums of products have the same bits then. Not vectorised, where
#: gcc multiplies first and adds in order.
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
    sources = [
        *sorted((ROOT / "tests/emulator/extension").glob("*.cpp")),
        *(
            ROOT / "csrc" / name
            for name in (
                "contract/activation_info.cpp",
                *(f"tensors/{stem}.cpp" for stem in ("checks", "devices", "dtypes", "passes", "stack")),
            )
        ),
    ]
    return load(
        "_C_emulated",
        [str(source) for source in sources],
        extra_include_paths=[str(ROOT / "csrc"), str(ROOT / "tests/emulator")],
        extra_cflags=["-O2", *FUSED, *sanitize, "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"],
        extra_ldflags=sanitize,
        build_directory=str(folder),
    )
