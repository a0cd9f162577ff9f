"""The readers of tools/gpu_proof: what they make of small texts such as nvdisasm and ptxas print."""

from pathlib import Path

import pytest

from tools.gpu_proof import compiled, planted, read, sass
from tools.gpu_proof.checks import Outcome
from tools.gpu_proof.compiled import Cubin, Usage
from tools.gpu_proof.kernels import ROOT, Kernel, demangle, parse

SIMT = "_ZN7fastmlp4cuda12simt_productIfNS0_8SimtTileILi128ELi128ELi8ELi8ELi8EEELNS0_4ReadE0ELS4_1ELNS0_8EpilogueE1EEEvNS0_7ProductIT_EE"  # noqa: E501
SUMS = "_ZN7fastmlp4cuda8sum_rowsIdEEvPKNS0_9ComputeOfIT_E4TypeEllPS3_"
KERNEL = Kernel("simt_product", "float32", (128, 128, 8, 8, 8), ("along_k", "along_rows", "dgrad"))


def test_names_of_kernels() -> None:
    found = demangle([SIMT, SUMS, "_Z4mainv"])
    assert found == {SIMT: KERNEL, SUMS: Kernel("sum_rows", "float64", (), ())}
    assert str(KERNEL) == "simt_product float32 128x128x8x8x8 along_k along_rows dgrad"


def test_names_with_an_enumerator_in_the_tile() -> None:
    name = (
        "void fastmlp::cuda::mma_product<fastmlp::Float16, fastmlp::cuda::MmaTile<128, 128, 32, 64, 64, "
        "(fastmlp::cuda::Read)2>, (fastmlp::cuda::Read)0, (fastmlp::cuda::Read)1, (fastmlp::cuda::Epilogue)2>"
        "(fastmlp::cuda::Product<fastmlp::Float16>)"
    )
    options = ("elements", "along_k", "along_rows", "wgrad")
    assert parse(name) == Kernel("mma_product", "float16", (128, 128, 32, 64, 64), options)


PTXAS = f"""\
ptxas info    : 24 bytes gmem, 8 bytes cmem[4]
ptxas info    : Compiling entry function '{SIMT}' for 'sm_80'
ptxas info    : Function properties for {SIMT}
    48 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 33800 bytes smem, 536 bytes cmem[0]
ptxas info    : Compiling entry function '{SUMS}' for 'sm_80'
ptxas info    : Function properties for {SUMS}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for called
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 384 bytes cmem[0]
"""


def test_ptxas_is_read() -> None:
    """What a called function spills is the kernel's."""
    assert compiled.read_usage(PTXAS) == {SIMT: Usage(128, 33800, 48, 8, 16), SUMS: Usage(32, 0, 8, 4, 4)}


def judged(usage: Usage, name: str = SIMT) -> Outcome:
    return compiled.check_cubins([Cubin("float32", 80, Path(), {name: usage})])


@pytest.mark.parametrize(
    ("usage", "what"),
    [
        (Usage(128, 33800, 0, 0, 8), "spills 0/8 bytes"),
        (Usage(129, 33800, 0, 0, 0), "129 registers, budget 128"),
        (Usage(128, 50000, 0, 0, 0), "50000 shared, budget 34816"),
    ],
)
def test_budget_is_kept(usage: Usage, what: str) -> None:
    assert not judged(Usage(128, 33800, 0, 0, 0)).failures
    (failure,) = judged(usage).failures
    assert what in failure.what


def test_kernels_without_a_budget_fail() -> None:
    (failure,) = judged(Usage(1, 0, 0, 0, 0), SIMT.replace("12simt_product", "11new_product")).failures
    assert "has no budget" in failure.what


def disassembly(*lines: str) -> str:
    """A function as `nvdisasm -c` prints it: labels are lines that begin with a dot."""
    body = [
        line if line.startswith(".L") else f"        /*{i:04x}0*/               {line} ;"
        for i, line in enumerate(lines)
    ]
    head = [f'\t.section\t.text.{SIMT},"ax",@progbits', '\t.sectioninfo\t@"SHI_REGISTERS=128"', f".text.{SIMT}:"]
    return "\n".join([*head, *body, '\t.section\t.nv.info,"",@"SHT_CUDA_INFO"', "        /*0000*/  .byte 0x04"])


LOADS = ["LDS.128 R4, [R2]"] * 8


def test_loops_are_found() -> None:
    """The loop with the products, without the one in it and without NOP; not that of an epilogue."""
    text = disassembly(
        "MOV R1, c[0x0][0x28]",
        ".L_x_0:",
        *LOADS,
        *["FFMA R0, R4, R5, R0"] * 128,
        "@P0 BRA `(.L_x_1)",  # forwards
        ".L_x_2:",
        "IADD3 R2, R2, 0x1, RZ",
        "@!P1 BRA `(.L_x_2)",
        ".L_x_1:",
        *["NOP"] * 50,
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "@P2 BRA `(.L_x_0)",
        ".L_x_3:",
        "LDS.128 R4, [R2]",
        *["FFMA R0, R4, R5, R0"] * 500,
        "@P2 BRA `(.L_x_3)",
        "EXIT",
    )
    found = sass.functions(text)
    assert list(found) == [SIMT]
    (mix,) = sass.main_loops(found[SIMT])
    assert (mix.math, mix.total) == (128, 8 + 128 + 1 + 1 + 1)
    assert (mix.count("LDS.128"), mix.count("LDS"), mix.count("BAR"), mix.count("LDG")) == (8, 8, 1, 0)


def test_tensor_cores_are_what_counts_where_they_are() -> None:
    loop = [*["LDSM.16.M88.4 R4, [R2]"] * 8, "HMMA.16816.F32 R0, R4, R8, R0", "FFMA R1, R1, R1, R1"]
    text = disassembly(".L_x_0:", *loop, "BRA `(.L_x_0)")
    (mix,) = sass.main_loops(sass.functions(text)[SIMT])
    assert (mix.math, mix.total, mix.count("LDSM")) == (1, 11, 8)


TILE = 8 * 8 * 8  # multiply-adds of a thread for one tile of k
GOOD = [*LOADS, *["FFMA R0, R4, R5, R0"] * TILE, "BAR.SYNC 0x0"]


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        (GOOD, ""),
        ([*GOOD, *["IADD3 R2, R2, 0x1, RZ"] * 100], "multiply and add, fewer than 86%"),
        ([*GOOD, *["LDS.128 R4, [R2]"] * 30], "multiply-adds for each LDS.128, fewer than 16"),
        ([*GOOD, "BAR.SYNC 0x0"], "2 barriers for 1 tiles of k"),
        ([*GOOD, "STL [R1], R2"], "1 accesses to local memory"),
    ],
)
def test_floors_are_kept(lines: list[str], what: str) -> None:
    rule = compiled.rule_of("read", KERNEL, 80)
    assert rule is not None
    mixes = sass.main_loops(sass.functions(disassembly(".L_x_0:", *lines, "BRA `(.L_x_0)"))[SIMT])
    wrong = "; ".join(read.check_mix(KERNEL, 80, mixes, rule))
    assert what in wrong
    assert bool(what) == bool(wrong)


def test_copies_are_asynchronous() -> None:
    kernel = Kernel("mma_product", "float16", (128, 128, 32, 64, 64), ("along_k", "along_k", "forward"))
    rule = compiled.rule_of("read", kernel, 80)
    assert rule is not None
    loop = [*["LDSM.16.M88.4 R4, [R2]"] * 16, *["HMMA.16816.F32 R0, R4, R8, R0"] * 64, "BAR.SYNC 0x0"]
    for copies, what in (
        (["LDGSTS.E.BYPASS.128 [R1], [R2.64]"] * 8, []),
        (["LDG.E.128 R4, [R2.64]", "STS.128 [R1], R4"], ["1 LDG and 1 STS beside 0 LDGSTS"]),
    ):
        mixes = sass.main_loops(sass.functions(disassembly(".L_x_0:", *loop, *copies, "BRA `(.L_x_0)"))[SIMT])
        assert read.check_mix(kernel, 80, mixes, rule) == what


def test_loops_that_sum_rows_have_a_floor_of_their_own() -> None:
    kernel = Kernel("mma_product", "float16", (128, 128, 32, 64, 64), ("along_rows", "along_rows", "wgrad"))
    rule = compiled.rule_of("read", kernel, 120)
    assert rule is not None
    for products, others, floor in ((64, 60, ""), (64, 100, "38%"), (72, 100, ""), (72, 140, "32%")):
        loop = [*["LDSM.16.MT88.4 R4, [R2]"] * 16, *["HMMA.16816.F32 R0, R4, R8, R0"] * products, "BAR.SYNC 0x0"]
        loop += ["LDGSTS.E.BYPASS.128 [R1], [R2.64]", *["IADD3 R2, R2, 0x1, RZ"] * others]
        mixes = sass.main_loops(sass.functions(disassembly(".L_x_0:", *loop, "BRA `(.L_x_0)"))[SIMT])
        wrong = "; ".join(read.check_mix(kernel, 120, mixes, rule))
        assert wrong.endswith(f"multiply and add, fewer than {floor}") if floor else not wrong


def test_kernels_without_tiles_of_k_are_judged_too() -> None:
    kernel = Kernel("fused_forward", "float32", (64, 4), ())
    rule = compiled.rule_of("read", kernel, 80)
    assert rule is not None
    for others, wrong in ((0, 0), (TILE, 1)):
        loop = [*LOADS, *["FFMA R0, R4, R5, R0"] * TILE, *["IADD3 R2, R2, 0x1, RZ"] * others]
        mixes = sass.main_loops(sass.functions(disassembly(".L_x_0:", *loop, "BRA `(.L_x_0)"))[SIMT])
        assert len(read.check_mix(kernel, 80, mixes, rule)) == wrong


@pytest.mark.parametrize("defect", planted.defects(), ids=lambda defect: defect.name)
def test_planted_defects_apply(defect: planted.Defect) -> None:
    assert planted.plant(defect) != (ROOT / "csrc" / defect.file).read_text()


def test_defects_that_do_not_apply_are_errors(tmp_path: Path) -> None:
    defect = planted.defects()[0]
    (tmp_path / "cuda").mkdir()
    (tmp_path / defect.file).write_text(f"{defect.old} {defect.old}")
    with pytest.raises(ValueError, match=r"no longer applies: csrc/.* has 2 times"):
        planted.plant(defect, tmp_path)
