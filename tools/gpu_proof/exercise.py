"""Runs each family of kernels on a few small shapes against the specification, in a process that gates start.

Small enough for ThreadSanitizer: some blocks, some tiles of k, aligned and ragged. The rest is in
tests/cuda/test_cuda_kernels.py.
"""

import argparse
import re
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch

from fastmlp.activations import resolve
from tests.support.emulated import checks, emulated, set_up


def network(dtype: torch.dtype, rows: int, widths: Sequence[int], activation: str, last: str = "identity") -> None:
    """Run forward and backward of layers of these widths; every second one has no bias."""
    pairs = list(pairwise(widths))
    checks.check(
        torch.randn(rows, widths[0], dtype=dtype),
        [torch.randn(n, k, dtype=dtype) / k**0.5 for k, n in pairs],
        [torch.randn(n, dtype=dtype) if i % 2 == 0 else None for i, (_, n) in enumerate(pairs)],
        [resolve(activation)] * (len(pairs) - 1) + [resolve(last)],
        torch.randn(rows, widths[-1], dtype=dtype),
    )


#: Kernels that run in every case of a network by layers, besides its products.
PASSES = ("elementwise", "sum_rows")


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None], tuple[str, ...]]]:
    """Yield names, what they run, and the families of kernels that they are about."""
    like = torch.empty(0, dtype=dtype)
    for architecture in (75, 80) if dtype == torch.bfloat16 else (80,):
        product = "mma_product" if dtype.itemsize == 2 and architecture >= 80 else "simt_product"
        for tile, (bm, bn, bk) in enumerate(emulated().tiles(architecture, like)):

            def layers(rows: int, widths: list[int], architecture: int = architecture, tile: int = tile) -> None:
                set_up(architecture, tile, "1", fuses=False)
                network(dtype, rows, widths, "silu")

            name = f"sm_{architecture} tile {bm}x{bn}x{bk}"
            aligned = partial(layers, bm + 8, [2 * bk + 8, bn + 8, 8])
            yield f"{name} aligned", aligned, (product, *PASSES)
            if tile > 0:
                ragged = partial(layers, bm + 1, [2 * bk + 3, bn + 1, 3])
                yield f"{name} ragged", ragged, (product, *PASSES)

    def long_batch() -> None:
        set_up(80, 2, "2", fuses=False)
        network(dtype, 560, [7, 9, 5, 3], "tanh", "sigmoid")

    yield "long batch", long_batch, ("mma_product" if dtype.itemsize == 2 else "simt_product", *PASSES)

    def fused(widths: list[int], activation: str) -> None:
        set_up(80, order="1")
        network(dtype, 70, widths, activation)

    def ends_in_a_chunk() -> None:
        set_up(80, order="1")
        checks.narrow_parts_of_chunks(dtype, resolve("silu"))

    kinds = ("mma_fused_backward", "mma_fused_forward") if dtype.itemsize == 2 else ("fused_backward", "fused_forward")
    if dtype != torch.float64:
        yield "narrow network", partial(fused, [7, 40, 9, 5], "gelu"), (*kinds, "sum_fused")
        yield "network of rows that end in a chunk", ends_in_a_chunk, (*kinds, "sum_fused")
        yield "network of 128 features", partial(fused, [8, 128, 16], "relu"), (*kinds, "sum_fused")


def main() -> None:
    """Run all cases of the dtypes asked for."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_proof.exercise", description=__doc__)
    parser.add_argument("dtypes", nargs="+", metavar="DTYPE")
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases whose name has it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.dtypes:
        torch.manual_seed(0)
        for case, function, families in cases(getattr(torch, name)):
            if re.search(options.only, case):
                started = time.perf_counter()
                function()
                seconds = time.perf_counter() - started
                print(f"{name} {case}: {seconds:.1f} s; {' '.join(families)}", flush=True)
    print("passed")


if __name__ == "__main__":
    main()
