"""Runs each family of kernels on a few small shapes against the specification, in a process that gates start.

Small enough for ThreadSanitizer: some blocks, some tiles of k, aligned and ragged. tests/test_cuda_kernels.py has the rest.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch

from fastmlp.activations import IDENTITY, resolve
from tests.emulated import emulated
from tests.test_cuda_kernels import check, set_up


def network(dtype: torch.dtype, rows: int, widths: Sequence[int], activation: str) -> None:
    """Run forward and backward of layers of these widths; every second one has no bias."""
    pairs = list(pairwise(widths))
    check(
        torch.randn(rows, widths[0], dtype=dtype),
        [torch.randn(n, k, dtype=dtype) / k**0.5 for k, n in pairs],
        [torch.randn(n, dtype=dtype) if i % 2 == 0 else None for i, (_, n) in enumerate(pairs)],
        [resolve(activation)] * (len(pairs) - 1) + [IDENTITY],
        torch.randn(rows, widths[-1], dtype=dtype),
    )


def cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield names and what they run."""
    like = torch.empty(0, dtype=dtype)
    for architecture in (75, 80) if dtype == torch.bfloat16 else (80,):
        for tile, (bm, bn, bk) in enumerate(emulated().tiles(architecture, like)):

            def layers(rows: int, widths: list[int], architecture: int = architecture, tile: int = tile) -> None:
                set_up(architecture, tile, "1", fuses=False)
                network(dtype, rows, widths, "silu")

            name = f"sm_{architecture} tile {bm}x{bn}x{bk}"
            yield f"{name} aligned", lambda f=layers, m=bm + 8, k=2 * bk + 8, n=bn + 8: f(m, [k, n, 8])
            if tile > 0:
                yield f"{name} ragged", lambda f=layers, m=bm + 1, k=2 * bk + 3, n=bn + 1: f(m, [k, n, 3])

    def long_batch() -> None:
        set_up(80, 2, "2", fuses=False)
        network(dtype, 560, [7, 9, 3], "tanh")

    yield "long batch", long_batch

    def fused() -> None:
        set_up(75, order="1")
        network(dtype, 70, [7, 40, 9, 5], "gelu")

    yield "narrow network", fused


def main() -> None:
    """Run all cases of the dtypes asked for."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_proof.exercise", description=__doc__)
    parser.add_argument("dtypes", nargs="+", metavar="DTYPE")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.dtypes:
        torch.manual_seed(0)
        for case, function in cases(getattr(torch, name)):
            if options.only in case:
                started = time.perf_counter()
                function()
                print(f"{name} {case}: {time.perf_counter() - started:.1f} s", flush=True)
    print("passed")


if __name__ == "__main__":
    main()
