"""The choice of the instruction set at run time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastmlp
from fastmlp import _C
from tests.support.axes import ISAS, tiles

# CPUID bits: OSXSAVE, FMA and F16C in leaf 1 ECX; AVX2, AVX-512 F, DQ, BW, VL in leaf 7 EBX; AVX512-BF16 in
# subleaf 1 of leaf 7, EAX.
OSXSAVE, FMA, F16C = 1 << 27, 1 << 12, 1 << 29
AVX2, AVX512 = 1 << 5, 1 << 16 | 1 << 17 | 1 << 30 | 1 << 31
BF16 = 1 << 5
SSE_STATE, YMM_STATE, ZMM_STATE = 0x03, 0x07, 0xE7


def run(layer: fastmlp.Linear) -> str:
    layer(torch.randn(3, 8))
    return _C.last_isa()


def test_the_forced_one_runs(isa: str) -> None:
    assert fastmlp.get_isa() == isa
    assert run(fastmlp.Linear(8, 8)) == isa


def test_backward_runs_the_forced_one(isa: str) -> None:
    y = fastmlp.Linear(8, 8)(torch.randn(3, 8))
    torch.nn.Linear(8, 1)(y).sum().backward()
    assert _C.last_isa() == isa


@pytest.mark.skipif("avx2" not in ISAS, reason="the processor has no FMA to tell apart")
def test_portable_does_not_use_fma() -> None:
    """(1 + e)(1 - e) - 1 is -e^2 with one rounding and 0 with two: the code that ran, not its label.

    Three rows, since those of a smaller product are summed in lanes, each of which rounds by itself.
    """
    e = 2.0**-13
    x, w = torch.tensor([[1.0, 1 + e]] * 3), torch.tensor([[-1.0, 1 - e]])
    before = fastmlp.get_isa()
    try:
        fastmlp.set_isa("portable")
        assert fastmlp.functional.linear(x, w).flatten().tolist() == [0.0] * 3
        fastmlp.set_isa("avx2")
        assert fastmlp.functional.linear(x, w).flatten().tolist() == [-(e**2)] * 3
    finally:
        fastmlp.set_isa(before)


def test_unknown_raises() -> None:
    with pytest.raises(ValueError, match=r"isa must be one of portable.*, got 'sse9'"):
        fastmlp.set_isa("sse9")


def test_unsupported_raises_and_changes_nothing() -> None:
    unsupported = [str(i["name"]) for i in _C.instruction_sets() if not i["supported"]]
    before = fastmlp.get_isa()
    for name in unsupported:
        with pytest.raises(ValueError, match=f"isa '{name}' needs"):
            fastmlp.set_isa(name)
    assert fastmlp.get_isa() == before


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_environment_variable(isa: str) -> None:
    code = (
        "import torch, fastmlp; from fastmlp import _C; "
        "fastmlp.Linear(3, 3)(torch.ones(1, 3)); print(fastmlp.get_isa(), _C.last_isa())"
    )
    assert in_process(code, FASTMLP_ISA=isa).stdout.split() == [isa, isa]


def test_wrong_environment_variable_raises() -> None:
    done = in_process("import fastmlp", FASTMLP_ISA="avx1024")
    assert done.returncode != 0
    assert "ImportError: fastmlp: the environment variable FASTMLP_ISA: isa must be one of portable" in done.stderr


@pytest.mark.skipif("avx2" not in [isa["name"] for isa in _C.instruction_sets()], reason="not an x86-64 build")
def test_operating_system_is_asked() -> None:
    """Without the operating system's support of a register state its instructions are not believed."""
    decode = _C.decode_features
    leaf1 = OSXSAVE | FMA | F16C
    assert decode(leaf1, AVX2 | AVX512, BF16, ZMM_STATE) == ["portable", "avx2", "avx512", "avx512_bf16"]
    assert decode(leaf1, AVX2 | AVX512, 0, ZMM_STATE) == ["portable", "avx2", "avx512"]
    assert decode(leaf1, AVX2 | AVX512, BF16, YMM_STATE) == ["portable", "avx2"]
    assert decode(leaf1, AVX2 | AVX512, BF16, SSE_STATE) == ["portable"]
    for bit in (OSXSAVE, FMA, F16C):
        assert decode(leaf1 & ~bit, AVX2 | AVX512, BF16, ZMM_STATE) == ["portable"]
    for i in (16, 17, 30, 31):
        assert decode(leaf1, AVX2 | AVX512 & ~(1 << i), BF16, ZMM_STATE) == ["portable", "avx2"]


def test_best_is_the_default() -> None:
    code = "import fastmlp; print(fastmlp.get_isa())"
    environment = {k: v for k, v in os.environ.items() if k != "FASTMLP_ISA"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    # Intel's processors multiply pairs of bfloat16 at half the rate of float32.
    cpuinfo = Path("/proc/cpuinfo")
    slow = "avx512_bf16" if cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text(encoding="utf-8") else None
    supported = [str(i["name"]) for i in _C.instruction_sets() if i["supported"] and i["name"] != slow]
    assert done.stdout.strip() == supported[-1]


L2 = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")


@pytest.mark.skipif(not L2.exists(), reason="the system says nothing of caches")
def test_blocks_fill_their_share_of_the_cache(isa: str, dtype: torch.dtype) -> None:
    """A block of A takes three eighths of an L2 cache of 256 KiB to 2 MiB, in whole panels."""
    kilobytes = int(L2.read_text(encoding="ascii").strip().removesuffix("K"))
    size = tiles(isa, dtype)
    share = min(max(kilobytes, 256), 2048) * 1024 * 3 / 8
    row = 4096  # bytes of one row of a block: KC of the type that is computed in
    assert size["MC"] % size["MR"] == 0
    assert size["MC"] * row <= share < (size["MC"] + size["MR"]) * row
