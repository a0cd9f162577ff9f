"""Loads the extension, after making sure that it belongs to the torch that is installed."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


class Torch(NamedTuple):
    """What an extension has to have in common with the torch that it runs with.

    Attributes:
        version: as `torch.__version__` has it.
        cxx11_abi: whether it has the newer binary interface of C++'s library.
        cuda: the version of CUDA, None without it; of a build, None without CUDA kernels.
    """

    version: str
    cxx11_abi: bool
    cuda: str | None

    @property
    def minor(self) -> list[str]:
        """The parts of the version that the binary interface changes with: 2 and 13 of "2.13.0+cpu"."""
        return self.version.split(".")[:2]

    def __str__(self) -> str:
        cuda = "" if self.cuda is None else f" with CUDA {self.cuda}"
        return f"{self.version}{cuda}{'' if self.cxx11_abi else ', _GLIBCXX_USE_CXX11_ABI=0'}"


def check_build(info: Path, found: Torch) -> None:
    """Raises ImportError unless the build described by `info` runs with this torch.

    An extension built against a torch of another minor version crashes or computes garbage, as it does with another
    binary interface of C++, so this is asked before the binary is touched. A build with CUDA kernels needs a torch that
    has CUDA of the same major version; one without runs beside any.

    Args:
        info: the file `_build.json` that the build wrote beside the extension.
        found: the torch of the running process.

    Raises:
        ImportError: if there is no build, or it was made with another torch.
    """
    if not info.exists():
        raise ImportError(
            f"fastmlp: it is not built, {info} is missing. If it is installed, start Python outside of its source "
            f"tree; if not, run there: {REBUILD}"
        )
    build = json.loads(info.read_text(encoding="utf-8"))
    needs = Torch(build["torch"], build.get("cxx11_abi", False), build.get("cuda_version"))
    if (needs.minor, needs.cxx11_abi) != (found.minor, found.cxx11_abi) or not _has_cuda_of(needs, found):
        raise ImportError(
            f"fastmlp: it was built with torch {needs}, but torch {found} is installed. In its source tree run: "
            f"{REBUILD}"
        )


def _has_cuda_of(needs: Torch, found: Torch) -> bool:
    if needs.cuda is None:
        return True
    return found.cuda is not None and needs.cuda.split(".")[0] == found.cuda.split(".")[0]


def read_build() -> dict[str, Any]:
    """What the build wrote about itself: "torch", the version, and "cuda_version", that of its kernels or None."""
    build: dict[str, Any] = json.loads(_INFO.read_text(encoding="utf-8"))
    return build


_INFO = Path(__file__).with_name("_build.json")
check_build(_INFO, Torch(torch.__version__, torch.compiled_with_cxx11_abi(), torch.version.cuda))

from fastmlp import _C  # noqa: E402  (only after the check)

if isa := os.environ.get("FASTMLP_ISA"):
    try:
        _C.set_isa(isa)
    except ValueError as error:
        reason = str(error).removeprefix("fastmlp: ")
        raise ImportError(f"fastmlp: the environment variable FASTMLP_ISA: {reason}") from error

__all__ = ["_C", "Torch", "check_build", "read_build"]
