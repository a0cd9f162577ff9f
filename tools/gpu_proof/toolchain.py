"""Finds CUDA's compiler and disassembler, and runs commands side by side."""

import hashlib
import importlib.util
import os
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

from tools.gpu_proof.kernels import ROOT

BUILD = ROOT / "build/gpu_proof"

T = TypeVar("T")
R = TypeVar("R")


class CommandError(Exception):
    """A command that should have succeeded; its message is what the command said."""


@cache
def toolkit() -> Path:
    """Return the folder with `bin/nvcc`: CUDA_HOME, or the one that the extra `gpu-proof` installs."""
    if home := os.environ.get("CUDA_HOME"):
        return Path(home)
    return wheels()


@cache
def wheels() -> Path:
    """Return where PyPI's CUDA packages lie in this environment."""
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec else ():
        if (Path(place) / "cu13/bin").is_dir():
            return Path(place) / "cu13"
    raise CommandError("there is no CUDA toolkit: install the extra gpu-proof, or let CUDA_HOME name one")


def tool(name: str) -> str:
    """Return the path of nvcc, nvdisasm, cuobjdump or ptxas."""
    for folder in (toolkit(), wheels()):
        if (folder / "bin" / name).exists():
            return str(folder / "bin" / name)
    raise CommandError(f"there is no {name} in {toolkit()}: install the extra gpu-proof")


@cache
def nvcc_version() -> str:
    """Return the last line of `nvcc --version`."""
    return run([tool("nvcc"), "--version"]).splitlines()[-1]


def run(
    command: Sequence[str | Path], cwd: Path = ROOT, env: Mapping[str, str] | None = None, seconds: float = 3600
) -> str:
    """Run a command; return what it printed, on either stream."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=seconds,
        check=False,
    )
    if done.returncode != 0:
        raise CommandError(f"{' '.join(map(str, command))}\nexit code {done.returncode}\n{done.stdout}")
    return done.stdout


def jobs() -> int:
    """Return how many commands run at once: MAX_JOBS, or as many as there are processors."""
    return int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))


def side_by_side(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Call the function for every item, in as many threads as there may be jobs; results in order."""
    with ThreadPoolExecutor(jobs()) as pool:
        return list(pool.map(function, items))


def digest(*parts: object) -> str:
    """Return a short name for contents: text, or paths whose contents count."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.read_bytes() if isinstance(part, Path) else str(part).encode())
        found.update(b"\0")
    return found.hexdigest()[:16]
