"""What nvcc really emits for the CUDA kernels, translated and executed by tests/emulator/ptx.

Here are kernels of compute_80 that stand for all: CI has minutes. `python -m tests.emulator.ptx` runs all kernels of
any architecture and dtype, as `make gpu-proof` does.
"""

import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastmlp import Activation
from fastmlp.activations import resolve
from tests.emulator.ptx import checks as ptx_checks
from tests.emulator.ptx.build import load, load_all, ptx_of
from tests.emulator.ptx.names import readable
from tests.emulator.ptx.profile import Ratios, accesses, measure, summary, whole_tiles
from tests.emulator.ptx.syntax import PtxError
from tests.emulator.ptx.translate import Kernel, translate
from tests.support.axes import ACTIVATIONS
from tests.support.emulated import ROOT, checks, emulated, set_up

ARCHITECTURE = 80
DTYPES = ("float32", "bfloat16")


@cache
def kernels(dtype: str) -> dict[str, Kernel]:
    return load(ARCHITECTURE, dtype)


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    kernels(request.param)
    return getattr(torch, request.param)


def test_bits_are_the_shim_s(dtype: torch.dtype) -> None:
    """Products, sums and the activations that need no libdevice."""
    rows = ptx_checks.bits(kernels(str(dtype).removeprefix("torch.")), dtype, ARCHITECTURE)
    assert [r for r in rows if not r.passed] == []


def test_every_activation(dtype: torch.dtype) -> None:
    rows = ptx_checks.bounds(kernels(str(dtype).removeprefix("torch.")), dtype, ARCHITECTURE, ACTIVATIONS)
    assert [r for r in rows if not r.passed] == []


@pytest.fixture
def translated(dtype: torch.dtype) -> Iterator[None]:
    emulated().set_route(ARCHITECTURE)
    yield
    emulated().set_route(0)


def test_special_values(dtype: torch.dtype, activation: Activation, translated: None, without_onednn: None) -> None:
    """NaN and infinities in libdevice's functions."""
    checks.special_values(dtype, activation)
    checks.special_values(dtype, activation, layers=2)


def test_profile(dtype: torch.dtype) -> None:
    """No bank conflicts, and whole sectors."""
    name = str(dtype).removeprefix("torch.")
    ratios = summary(measure(kernels(name), dtype, ARCHITECTURE, whole_tiles(dtype)))
    assert len([r for r in ratios if "_product" in r.kernel]) == 9  # three tiles and epilogues
    assert [(readable(r.kernel), r.misses(), r.worst) for r in ratios if r.misses()] == []


def test_a_case_that_runs_no_kernel_has_failed() -> None:
    """As where none is loaded for its architecture: nothing else would tell."""
    case = ptx_checks.Case(9, (8, 16, 8), resolve("relu"), card=ARCHITECTURE)
    tallies = ptx_checks.run_cases([case], torch.float32, ARCHITECTURE + 1, lambda case, results: None)
    (row,) = ptx_checks.rows_of([], tallies, torch.float32, ARCHITECTURE + 1, "bits")
    assert not row.passed
    assert "no translated kernel" in row.result


# What the gates are for: each planted defect is caught. Kernels with defects have a route of their own.
PLANTED = 1000


def forward(dtype: torch.dtype, route: int, tile: int, act: str = "relu") -> Tensor:
    """One layer of whole tiles."""
    torch.manual_seed(0)
    set_up(ARCHITECTURE, tile)
    emulated().set_route(route)
    try:
        stack = checks.native((False,), (resolve(act),))
        input, weight = torch.randn(64, 64, dtype=dtype), torch.randn(64, 64, dtype=dtype)
        return emulated().infer(stack, input, [weight])
    finally:
        emulated().set_route(0)
        set_up()


def plant(text: str, wanted: str) -> dict[str, Kernel]:
    """A text's kernel of that readable name, on the route of defects."""
    return load_all([k for k in translate(text, PLANTED) if readable(k.name) == wanted])


def changed_sources(folder: Path, file: str, *changes: tuple[str, str]) -> Path:
    """A copy of csrc where a file is changed."""
    copy = folder / "csrc"
    shutil.copytree(ROOT / "csrc", copy)
    text = (copy / file).read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (copy / file).write_text(text, encoding="utf-8")
    return copy


def profile_of(planted: dict[str, Kernel], dtype: torch.dtype, tile: int) -> Ratios:
    def run() -> None:
        forward(dtype, PLANTED, tile)

    (ratios,) = summary(accesses(planted, run))
    return ratios


def test_lost_permutation_of_chunks_is_seen(tmp_path: Path) -> None:
    """Rows of a matrix that lie in the same banks."""
    changes = ("(chunk ^ (line / lines_of_banks % permuted))", "chunk")
    csrc = changed_sources(tmp_path, "cuda/mma.cuh", changes)
    planted = plant(ptx_of("bfloat16", ARCHITECTURE, csrc), "mma_product 64x64x32 along_k forward")
    assert profile_of(planted, torch.bfloat16, 1).main_loop > 1.5


SMALL = "simt_product 32x32x16 along_k forward"


def test_vectors_that_nvcc_takes_apart_are_seen(tmp_path: Path) -> None:
    """As epilogues once stored them: four elements one by one, each in the sectors of all."""
    changes = ("store(to, v);", "*reinterpret_cast<Vec<S, 4>*>(to) = v;")
    csrc = changed_sources(tmp_path, "cuda/arithmetic.cuh", changes)
    planted = plant(ptx_of("float32", ARCHITECTURE, csrc), SMALL)
    assert torch.equal(forward(torch.float32, PLANTED, 2), forward(torch.float32, 0, 2))
    assert profile_of(planted, torch.float32, 2).sectors > 1.05


def test_a_rounding_more_is_seen() -> None:
    """Products that are rounded before they are added: no bound would show it."""
    kernels("float32")
    text = ptx_of("float32", ARCHITECTURE)
    fused = r"fma\.rn\.f32 \t(%f\d+), (%f\d+), (%f\d+), (%f\d+);"
    plant(re.sub(fused, r"{ .reg .f32 %once; mul.rn.f32 %once, \2, \3; add.rn.f32 \1, %once, \4; }", text), SMALL)
    expected = forward(torch.float32, 0, 2)
    assert torch.equal(forward(torch.float32, ARCHITECTURE, 2), expected)
    assert not torch.equal(forward(torch.float32, PLANTED, 2), expected)


def test_shared_memory_is_aligned_as_declared_and_no_better() -> None:
    text = ptx_of("float32", ARCHITECTURE)
    assert re.search(r"\.shared \.align 16 \.b8 \S*SimtShared", text)
    plant(re.sub(r"\.shared \.align 16 ", ".shared .align 4 ", text), SMALL)
    with pytest.raises(RuntimeError, match=r"PTX line \d+: an access of \d+ bytes is misaligned"):
        forward(torch.float32, PLANTED, 2)


def test_a_kernel_that_was_not_translated_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no translated kernel for compute_1 is loaded of _ZN7fastmlp4cuda12simt"):
        forward(torch.float32, 1, 2)


KERNEL = """
.version 9.0
.target sm_80
.address_size 64
.visible .entry twice(
	.param .u64 twice_param_0
)
.maxntid 32, 1, 1
{
	.reg .pred 	%p<2>;
	.reg .f32 	%f<3>;
	.reg .b32 	%r<2>;
	.reg .b64 	%rd<5>;
	ld.param.u64 	%rd1, [twice_param_0];
	mov.u32 	%r1, %tid.x;
	setp.gt.s32 	%p1, %r1, 15;
	@%p1 bra 	$L__BB0_2;
	mul.wide.s32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
	ld.global.f32 	%f1, [%rd3];
	add.f32 	%f2, %f1, %f1;
	st.global.f32 	[%rd3], %f2;
$L__BB0_2:
	ret;
}
"""

UNKNOWN = {
    "modifier": ("add.f32", "add.sat.f32"),
    "rounding": ("add.f32", "add.rm.f32"),
    "type": ("ld.global.f32", "ld.global.f16"),
    "space": ("st.global", "st"),
    "cache": ("ld.global.f32", "ld.volatile.global.f32"),
    "opcode": ("add.f32 	%f2, %f1, %f1", "sqrt.rn.f32 %f2, %f1"),
    "operand": ("%tid.x", "%clock"),
    "register": ("add.f32 	%f2", "add.f32 	%f7"),
    "address": ("[%rd3];\n	add", "[symbol];\n	add"),
    "count": ("add.f32 	%f2, %f1, %f1", "add.f32 	%f2, %f1, %f1, %f1"),
    "declaration": (".reg .f32 	%f<3>;", ".reg .f32x2 %f<3>;"),
    "attribute": (".maxntid 32, 1, 1", ".reqntid 32, 1, 1"),
    "pragma": ("ret;", '.pragma "used_bytes_mask";\n	ret;'),
    "predicate": ("@%p1", "@%r1"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_is_unknown_is_an_error(what: str) -> None:
    assert len(translate(KERNEL)) == 1
    old, new = UNKNOWN[what]
    assert old in KERNEL
    with pytest.raises(PtxError, match=r"PTX line \d+: "):
        translate(KERNEL.replace(old, new))


def test_errors_name_line_and_opcode() -> None:
    with pytest.raises(PtxError, match=r"PTX line 21: unknown instruction add\.sat\.f32 %f2, %f1, %f1"):
        translate(KERNEL.replace("add.f32", "add.sat.f32"))
