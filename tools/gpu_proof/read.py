"""Gate `read`: what the main loops of our kernels consist of, by the floors of budget.toml."""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from tools.gpu_proof.checks import Check, Outcome
from tools.gpu_proof.compiled import Cubin, rule_of
from tools.gpu_proof.kernels import Kernel, demangle
from tools.gpu_proof.sass import Mix, functions, main_loops
from tools.gpu_proof.toolchain import run, side_by_side, tool

COLUMNS = ("kernel", "for", "multiply-adds", "LDS.128", "LDS", "LDSM", "LDG", "LDGSTS", "STS", "barriers", "local")


def math_of_tile(kernel: Kernel, architecture: int) -> tuple[int, ...]:
    """Return how many multiply-adds a thread may have for one tile of k.

    The tiles of simt.cuh are BM BN BK TM TN, with TM TN BK; those of mma.cuh BM BN BK WM WN, with products of 16x8x16
    for a warp, or before sm_80 of half that depth. Their wgrad has a second loop, with a product of ones for each 16
    rows: the sums of rows.
    """
    *_, bk, m, n = kernel.numbers[:5]
    if kernel.family == "mma_product":
        depth = bk // (8 if architecture < 80 else 16)
        products = prod((m // 16, n // 8, depth))
        return (products, products + m // 16 * depth) if "wgrad" in str(kernel) else (products,)
    return (prod((m, n, bk)),)


def read_cubin(cubin: Cubin) -> dict[Kernel, list[Mix]]:
    """Disassemble a cubin of ours; return the main loops of each kernel."""
    text = run([tool("nvdisasm"), "-c", cubin.path])
    found = functions(text)
    return {kernel: main_loops(found[mangled]) for mangled, kernel in demangle(found).items()}


def check_mix(kernel: Kernel, architecture: int, mixes: Sequence[Mix], rule: Mapping[str, Any]) -> list[str]:
    """Return what of a kernel's main loops falls short of a rule."""
    if not mixes:
        return ["has no main loop"]
    wrong = []
    tiles = math_of_tile(kernel, architecture) if rule.get("one_barrier") else ()
    for mix in mixes:
        by_tiles = [mix.count("BAR") * tile for tile in tiles]
        sums_rows = mix.math in by_tiles[1:]
        least_share = rule.get("share_with_row_sums" if sums_rows else "share", rule.get("share", 0))
        if mix.share < least_share:
            wrong.append(f"{mix.share:.1%} multiply and add, fewer than {least_share:.0%}")
        for name, least in rule.get("per_load", {}).items():
            if mix.math < least * mix.count(name):
                wrong.append(f"{mix.math / mix.count(name):.1f} multiply-adds for each {name}, fewer than {least}")
        loads, stores, copies = mix.count("LDG", "LD"), mix.count("STS"), mix.count("LDGSTS")
        if rule.get("asynchronous") and (not copies or loads or stores):
            wrong.append(f"{loads} LDG and {stores} STS beside {copies} LDGSTS")
        if tiles and mix.math not in by_tiles:
            wrong.append(f"{mix.count('BAR')} barriers for {mix.math / tiles[0]:g} tiles of k")
        if mix.count("LDL", "STL"):
            wrong.append(f"{mix.count('LDL', 'STL')} accesses to local memory")
    return wrong


def check_cubins(cubins: Iterable[Cubin]) -> Outcome:
    """Read every cubin; kernels without a rule are shown but not judged."""
    outcome = Outcome(columns=COLUMNS, title="main loops: instructions")
    cubins = list(cubins)
    lines = []
    for cubin, kernels in zip(cubins, side_by_side(read_cubin, cubins), strict=True):
        for kernel, mixes in kernels.items():
            rule = rule_of("read", kernel, cubin.architecture)
            for mix in mixes:
                lines.append((str(kernel), cubin.architecture, _cells(mix)))
            if rule is not None:
                wrong = check_mix(kernel, cubin.architecture, mixes, rule)
                what = f"{kernel}: {'; '.join(wrong) or f'{mixes[0].share:.1%} multiply and add'}"
                outcome.checks.append(Check("read", kernel.family, kernel.dtype, cubin.where, what, not wrong))
    outcome.lines = [(kernel, f"sm_{architecture}", *cells) for kernel, architecture, cells in sorted(lines)]
    return outcome


def _cells(mix: Mix) -> tuple[str, ...]:
    counts = (mix.count("LDS.128"), mix.count("LDS"), mix.count("LDSM"), mix.count("LDG", "LD"), mix.count("LDGSTS"))
    others = (mix.count("STS"), mix.count("BAR"), mix.count("LDL", "STL"))
    return f"{mix.math}/{mix.total} {mix.share:.1%}", *map(str, counts + others)
