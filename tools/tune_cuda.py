"""The measurements behind csrc/cuda/tiles.h: every tile and the library's product, timed on a GPU, and costs fitted.

`python -m tools.tune_cuda times.json` times and writes; with `--fit` it reads the file, fits, and prints rows for
tiles.h. Times are of the device alone, by replays of a captured graph. Forward is one layer with relu; dgrad applies
relu's derivative and sums a bias gradient; wgrad is the weight's gradient alone.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import linear

from fastmlp import _C
from fastmlp.activations import IDENTITY, resolve
from fastmlp.benchmark.standard import Call, device_time
from fastmlp.ops import stack_of

Cost = Callable[[list[float], dict[str, Any]], float]

#: As csrc/cuda/tiles.h numbers them; -1 is what its costs choose.
WAYS = {"large": 0, "medium": 1, "small": 2, "library": 3, "table": -1}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
#: BM, BN and BK behind each size of tile (product_plan.cuh).
TILES = {
    "float32": ((128, 128, 8), (64, 64, 16), (32, 32, 16)),
    "float64": ((64, 64, 8), (64, 64, 8), (32, 32, 8)),
    "bfloat16": ((128, 128, 32), (64, 64, 32), (16, 64, 64)),
}
#: Rows, outputs and inputs of a layer.
SHAPES = (
    *((s, s, s) for s in (128, 256, 512, 1024, 2048, 4096)),
    *(
        (rows, width, width)
        for width in (64, 128, 256, 512, 1024, 2048, 4096)
        for rows in (16, 128, 1024, 8192, 65536)
        if rows * width <= 2**26
    ),
    *((33, 257, 129), (100, 3, 1000), (65536, 64, 3), (65536, 1, 64), (1024, 512, 13), (1024, 10, 128)),
)
#: The library's calls take the host longer than a kernel of ours, in microseconds.
HOST = 1.0
#: tiles.h: cost_of_elements.
ELEMENTS = {"float32": 1.1, "float64": 1.1, "bfloat16": 2.0}
#: tiles.h: shortest_part and most_parts.
SHORTEST_PART, MOST_PARTS = 256, 64


def calls(m: int, n: int, k: int, dtype: torch.dtype) -> Iterator[tuple[str, Call, Call]]:
    """What is timed of a layer: its name, fastmlp's call, and PyTorch's of the same."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    x, w, b, g, hidden = randn(m, k), randn(n, k) / k**0.5, randn(n), randn(m, n), torch.relu(randn(m, k))
    relu = resolve("relu")
    one, plain = stack_of((True,), (relu,)).native, stack_of((False,), (IDENTITY,)).native
    # A network 1 -> k -> n of which the first bias alone has a gradient.
    two, first, first_bias, input = stack_of((True, False), (relu, IDENTITY)).native, randn(k, 1), randn(k), randn(m, 1)
    needs = [False, False, True, False]

    def eager_dgrad() -> tuple[Tensor, Tensor]:
        grad = torch.ops.aten.threshold_backward(g @ w, hidden, 0)
        return grad, grad.sum(0)

    yield "forward", lambda: _C.infer(one, x, [w, b]), lambda: torch.relu_(linear(x, w, b))
    yield "dgrad", lambda: _C.backward(two, g, input, [hidden], [first, first_bias, w], needs), eager_dgrad
    yield "wgrad", lambda: _C.backward(plain, g, x, [], [w], [False, True]), lambda: g.t() @ x


def measure(output: Path) -> None:
    """Times everything, and writes a list of rows."""
    set_up = torch.ops.fastmlp_cuda.set_up
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        for m, n, k in SHAPES:
            for what, ours, eager in calls(m, n, k, dtype):
                row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "m": m, "n": n, "k": k, "what": what}
                row["eager"] = device_time(eager)
                for way, number in WAYS.items():
                    set_up(number, 0)
                    row[way] = device_time(ours)
                set_up(-1, -1)
                rows.append(row)
                print(row, flush=True)
    gpu = torch.cuda.get_device_properties(0)
    about = {"GPU": gpu.name, "multiprocessors": gpu.multi_processor_count, "torch": torch.__version__}
    output.write_text(json.dumps({"about": about, "rows": rows}) + "\n", encoding="utf-8")


def dimensions(row: dict[str, Any]) -> tuple[int, int, int]:
    """M, N and K of the product."""
    m, n, k = row["m"], row["n"], row["k"]
    return {"forward": (m, n, k), "dgrad": (m, k, n), "wgrad": (n, k, m)}[row["what"]]


def reads_vectors(row: dict[str, Any]) -> bool:
    vector = 16 // getattr(torch, row["dtype"]).itemsize
    n, k = row["n"], row["k"]
    lengths = {"forward": (k,), "dgrad": (k, n), "wgrad": (k, n)}[row["what"]]
    return all(length % vector == 0 for length in lengths)


def fit(path: Path) -> None:
    """Prints costs for tiles.h, and how much slower than the fastest their choices were."""
    measured = json.loads(path.read_text(encoding="utf-8"))
    multiprocessors = measured["about"]["multiprocessors"]
    print(f"constexpr int64_t measured_multiprocessors = {multiprocessors};")
    for dtype in TILES:
        for what in ("forward", "dgrad", "wgrad"):
            rows = [row for row in measured["rows"] if row["dtype"] == dtype and row["what"] == what]
            fit_product(dtype, what, rows, multiprocessors)


def fit_product(dtype: str, what: str, rows: list[dict[str, Any]], multiprocessors: int) -> None:
    """The costs of one dtype and epilogue, by least sums of absolute logarithms."""

    def tile_cost(logs: list[float], row: dict[str, Any], tile: tuple[int, int, int]) -> float:
        start, latency, term, finish = (math.exp(log) for log in logs)
        m, n, k = dimensions(row)
        tiles = math.ceil(m / tile[0]) * math.ceil(n / tile[1])
        cuts = min(max(k // SHORTEST_PART, 1), MOST_PARTS) if what == "wgrad" else 1
        parts = min(max(2 * multiprocessors // tiles, 1), cuts)
        part = math.ceil(math.ceil(k / parts) / tile[2]) * tile[2]
        waves = math.ceil(tiles * math.ceil(k / part) / multiprocessors)
        part = min(part, k)
        return start + max(part * latency, waves * (part * term + finish))

    def library_cost(logs: list[float], row: dict[str, Any]) -> float:
        start, tflops, reads, writes = (math.exp(log) for log in logs)
        m, n, k = dimensions(row)
        element = getattr(torch, dtype).itemsize * 1e-6
        return start + max(2e-6 * m * n * k / tflops, element * k * (m + n) / reads) + element * m * n / writes

    def fitted(cost: Cost, way: str, starts: list[list[float]]) -> list[float]:
        some = [row for row in rows if way == "library" or reads_vectors(row)]

        def loss(logs: list[float]) -> float:
            return sum(abs(math.log(cost(logs, row) / row[way])) for row in some) / len(some)

        options = {"maxiter": 4000, "maxfev": 4000}
        results = [
            minimize(loss, [math.log(x) for x in start], method="Nelder-Mead", options=options) for start in starts
        ]
        return list(min(results, key=lambda result: result.fun).x)

    costs: dict[str, Callable[[dict[str, Any]], float]] = {}
    texts = []
    for way, tile in zip(("large", "medium", "small"), TILES[dtype], strict=True):
        starts = [[3, term, term / 2, 0.3] for term in (0.01, 0.03, 0.1)]
        logs = fitted(lambda logs, row, tile=tile: tile_cost(logs, row, tile), way, starts)  # type: ignore[misc]
        costs[way] = lambda row, logs=logs, tile=tile: (  # type: ignore[misc]
            tile_cost(logs, row, tile) * (1 if reads_vectors(row) else ELEMENTS[dtype])
        )
        texts.append("{{{:.2f}, {:.4f}, {:.4f}, {:.3f}}}".format(*map(math.exp, logs)))
    logs = fitted(library_cost, "library", [[4, tflops, 2.5, 2] for tflops in (20, 100, 400)])
    costs["library"] = lambda row: library_cost(logs, row) + HOST
    start, *rates = map(math.exp, logs)
    texts.append("{{{:.2f}, {:.1f}, {:.2f}, {:.2f}}}".format(start + HOST, *rates))
    ratios = []
    for row in rows:
        ways = [way for way in costs if way != "large" or reads_vectors(row)]
        chosen = row[min(ways, key=lambda way: costs[way](row))]
        ratios.append(chosen / min(row[way] for way in ways))
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    quality = f"{mean:.3f} times the fastest in the mean, {max(ratios):.2f} at worst"
    print(f"{{{{{{{', '.join(texts[:3])}}}}}, {texts[3]}}},  // {dtype} {what}: {quality}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.tune_cuda", description=__doc__)
    parser.add_argument("times", type=Path, help="file to write, or to read with --fit")
    parser.add_argument("--fit", action="store_true", help="fit costs to the times of a file")
    options = parser.parse_args()
    fit(options.times) if options.fit else measure(options.times)


if __name__ == "__main__":
    main()
