"""Kernels by names that people read."""

import re
import subprocess
from functools import cache

_READS = ("along_k", "along_rows", "elements")
_EPILOGUES = ("forward", "dgrad", "wgrad")
_PASSES = ("gradient", "value")


@cache
def demangled(name: str) -> str:
    """A mangled name as C++ writes it."""
    return subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()


def readable(name: str) -> str:
    """A mangled name as family, tile, how operands are read and epilogue: simt_product 64x64x16 along_k dgrad."""
    text = demangled(name).replace("fastmlp::cuda::", "").replace("fastmlp::", "")
    found = re.match(r"(?:void )?(\w+)<", text)
    if found is None:
        return text
    words = [found[1]]
    if tile := re.search(r"Tile<(\d+), (\d+), (\d+)", text):
        words.append("x".join(tile.groups()))
    if width := re.search(r"fused_\w+<[\w:]+, (\d+)(?:, (\d+))?", text):
        words.append("x".join(n for n in width.groups() if n))
    if "ActivationList<Identity, Relu>" in text:
        words.append("light")
    words += dict.fromkeys(_READS[int(n)] for n in re.findall(r"\(Read\)(\d)", text))
    words += [_EPILOGUES[int(n)] for n in re.findall(r"\(Epilogue\)(\d)", text)]
    words += [_PASSES[int(n)] for n in re.findall(r"\(Elementwise\)(\d)", text)]
    words += ["vectors" if n != "1" else "elements" for n in re.findall(r"\(Elementwise\)\d, (\d+)", text)]
    return " ".join(words)


def launches(name: str, architecture: int) -> bool:
    """Whether products.cuh ever launches that kernel there: bfloat16 has tensor cores from sm_80 on."""
    text = demangled(name)
    if "<fastmlp::BFloat16" not in text or not ("_product" in text or "fused" in text):
        return True
    if "fused" in text:
        return architecture >= 80
    return ("mma_product" in text) == (architecture >= 80)
