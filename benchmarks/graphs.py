"""Models that are graphs of layers, frozen, against themselves in eager inference."""

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import nn

from benchmarks.machine import describe
from benchmarks.tables import console
from fastmlp import freeze
from fastmlp.benchmark.timing import Effort, race, ratio
from tests.support.graphs import Actor, Critic, NeRF, ResNet, Twins

#: Models in sizes that programs use, and the features of their inputs.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "rtdl ResNet, 4 blocks of 192-384": (lambda: ResNet(8, 192, 384, 1, 4), (8,)),
    "the same with LayerNorm": (lambda: ResNet(8, 192, 384, 1, 4, nn.LayerNorm), (8,)),
    "NeRF, 8 layers of 256": (lambda: NeRF(63, 27, 256, 8, 4), (90,)),
    "SAC's actor, 17-256-256-(6, 6)": (lambda: Actor(17, 256, 6), (17,)),
    "SAC's critic of (17, 6), 256-256-1": (lambda: Critic(17, 6, 256), (17, 6)),
    "twin critics, 23-256-256-1 each": (lambda: Twins(23, 256), (23,)),
}


def main() -> None:
    """Time every model with every number of rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.graphs", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of both (1)")
    parser.add_argument("--rounds", type=int, default=31, metavar="N", help="at most, 2 or more (31)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 1024], metavar="N", help="(1 32 1024)")
    options = parser.parse_args()

    out, machine = console(), describe(options.threads)
    table = Table(title=f"frozen graphs: {machine}", caption="eager over frozen, the median over rounds in turn")
    table.add_column("model")
    for rows in options.rows:
        table.add_column(f"{rows} rows, us", justify="right")
        table.add_column("x", justify="right")
    for name in MODELS:
        cells = [cell for rows in options.rows for cell in measured(name, rows, Effort(options.rounds))]
        table.add_row(name, *cells)
    out.print(table)


def measured(name: str, rows: int, effort: Effort) -> tuple[str, str]:
    """Return the time of a call of a frozen model, and how many times as long eager inference takes."""
    torch.manual_seed(0)
    make, features = MODELS[name]
    model, inputs = make().eval(), tuple(torch.randn(rows, size) for size in features)
    frozen = freeze(model, inputs=inputs)
    with torch.inference_mode():
        check(model(*inputs), frozen(*inputs))
        times = race({"eager": lambda: model(*inputs), "frozen": lambda: frozen(*inputs)}, effort)
    return f"{1e6 * median(times['frozen']):.1f}", f"{ratio(times['eager'], times['frozen']):.2f}"


def check(expected: Any, found: Any) -> None:
    """Raise unless both computed the same, so that nothing else is timed."""
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    main()
