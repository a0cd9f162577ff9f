"""Names of kernels, as compilers write them and as tables show them."""

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc/cuda"

DTYPES = {"float": "float32", "double": "float64", "BFloat16": "bfloat16", "Float16": "float16"}


@dataclass(frozen=True, order=True)
class Kernel:
    """One instantiation of a kernel template."""

    family: str  # the template's name
    dtype: str
    numbers: tuple[int, ...]  # of its tile or its own, in the order of the template's parameters
    options: tuple[str, ...]  # its enumerators, as `along_k` or `forward`, and how many activations it knows

    def __str__(self) -> str:
        """Return for example `simt_product float32 128x128x8x8x8 along_k along_k forward`."""
        return " ".join(filter(None, (self.family, self.dtype, "x".join(map(str, self.numbers)), *self.options)))

    @property
    def shape(self) -> str:
        """Return what is left without the dtype."""
        return " ".join(filter(None, (self.family, "x".join(map(str, self.numbers)), *self.options)))


@cache
def enumerators() -> dict[str, tuple[str, ...]]:
    """Return the enumerators of every `enum class` of the CUDA sources, by its name."""
    text = "".join(path.read_text() for path in sorted(CUDA.glob("*.*h")))
    found = re.findall(r"enum class (\w+)[^{;]*\{([^}]*)\}", text)
    return {name: tuple(part.split("=")[0].strip() for part in body.split(",") if part.strip()) for name, body in found}


def parse(demangled: str) -> Kernel | None:
    """Read the signature of a kernel; None for other functions."""
    match = re.match(r"(?:void )?fastmlp::cuda::(?:\(anonymous namespace\)::)?(\w+)<(.*)>\((.*)\)$", demangled)
    if match is None:
        return None
    family, arguments = match[1], match[2].replace("fastmlp::cuda::", "").replace("fastmlp::", "")
    dtype = DTYPES.get(arguments.split(",")[0].strip())
    if dtype is None:
        return None
    numbers = tuple(map(int, re.findall(r"(?<![\w)])\d+\b", arguments)))
    activations = re.search(r"ActivationList<([^<>]*)>", arguments)
    options = tuple(enumerators()[name][int(number)] for name, number in re.findall(r"\((\w+)\)(\d+)", arguments))
    if activations is not None:
        options += (f"{activations[1].count(',') + 1} activations",)
    return Kernel(family, dtype, numbers, options)


def demangle(names: Iterable[str]) -> dict[str, Kernel]:
    """Return those of the mangled names that are kernels."""
    mangled = list(dict.fromkeys(names))
    if not mangled:
        return {}
    command = ["c++filt"]
    lines = subprocess.run(command, input="\n".join(mangled), check=True, capture_output=True, text=True).stdout
    parsed = zip(mangled, map(parse, lines.splitlines()), strict=True)
    return {name: kernel for name, kernel in parsed if kernel is not None}
