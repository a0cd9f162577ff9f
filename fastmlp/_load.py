"""Loads the extension, after making sure that it belongs to the torch that is installed."""

import json
import os
from pathlib import Path
from typing import Any

import torch

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def check_build(info: Path, torch_version: str) -> None:
    """Raises ImportError unless the build described by `info` was made for this torch.

    An extension built against another torch crashes or computes garbage, so this is asked before
    the binary is touched.

    Args:
        info: the file `_build.json` that the build wrote beside the extension.
        torch_version: `torch.__version__` of the running process.

    Raises:
        ImportError: if there is no build, or it was made with another torch.
    """
    if not info.exists():
        raise ImportError(
            f"fastmlp: it is not built, {info} is missing. If it is installed, start Python outside of its source "
            f"tree; if not, run there: {REBUILD}"
        )
    built_with = json.loads(info.read_text(encoding="utf-8"))["torch"]
    if built_with != torch_version:
        raise ImportError(
            f"fastmlp: it was built with torch {built_with}, but torch {torch_version} is installed. "
            f"In its source tree run: {REBUILD}"
        )


def read_build() -> dict[str, Any]:
    """What the build wrote about itself: "torch", the version, and "cuda", whether it is built in."""
    build: dict[str, Any] = json.loads(_INFO.read_text(encoding="utf-8"))
    return build


_INFO = Path(__file__).with_name("_build.json")
check_build(_INFO, torch.__version__)

from fastmlp import _C  # noqa: E402  (only after the check)

if isa := os.environ.get("FASTMLP_ISA"):
    try:
        _C.set_isa(isa)
    except ValueError as error:
        reason = str(error).removeprefix("fastmlp: ")
        raise ImportError(f"fastmlp: the environment variable FASTMLP_ISA: {reason}") from error

__all__ = ["_C", "check_build", "read_build"]
