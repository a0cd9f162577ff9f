"""Models of other libraries against themselves converted: results, and the time of a training step."""

import argparse
from collections.abc import Iterator
from functools import partial
from statistics import median

import torch
from rich.table import Table
from torch import nn

from benchmarks.machine import describe
from benchmarks.tables import console
from benchmarks.timing import Effort, race
from fastmlp.explain import Report
from tests.support.comparison import PARTS, compare, pair
from tests.support.models import STEPS, SUBJECTS, Subject

#: The ways to convert, by what `trace` is.
WAYS = {"in place": False, "trace=True": True}

#: Seconds to time a model in, twice the usual: a sample is a whole training.
PATIENCE = 10.0

CAPTION = f"""
differences: the largest from the same model unconverted, in float64, as a share of the most that rounding explains \
(tests/support/rounding.py); fused, kept: by fusion_report, in training mode; step x: the time of {STEPS} training \
steps unconverted over converted, in float32, the median over rounds in turn"""


def main() -> None:
    """Compare every model and print a line for each way to convert it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of both (1)")
    parser.add_argument("--rounds", type=int, default=31, metavar="N", help="at most, 2 or more (31)")
    options = parser.parse_args()

    out, machine = console(), describe(options.threads)
    table = Table(title=f"models: {machine}", caption=CAPTION.strip(), caption_justify="left")
    for name in ("model", "parameters", "converted", "fused", "kept"):
        table.add_column(name, justify="right" if name == "parameters" else "left")
    for name in (*PARTS, "keys", "step, ms", "step x"):
        table.add_column(name, justify="right")
    for kind in SUBJECTS:
        for cells in rows(kind, Effort(options.rounds, PATIENCE)):
            table.add_row(*cells)
        table.add_section()
    out.print(table)


def rows(kind: type[Subject], effort: Effort) -> Iterator[list[str]]:
    """Yield the cells for each way to convert a model."""
    ways = {way: trace for way, trace in WAYS.items() if kind.traceable or not trace}
    times = seconds(kind(torch.float32), ways, effort)
    subject = kind(torch.float64)
    for way, trace in ways.items():
        plain, converted = pair(subject, trace)
        found = compare(subject, plain, converted)
        ratio = median(other / own for other, own in zip(times["plain"], times[way], strict=True))
        yield [
            *(kind.name, f"{sum(p.numel() for p in plain.parameters())}", way, *fused_and_kept(found.report)),
            *(f"{found.share(part):.1%}" for part in PARTS),
            *("equal" if found.keys else "[red]differ[/]", f"{1e3 * median(times[way]) / STEPS:.2f}", f"{ratio:.2f}"),
        ]


def seconds(subject: Subject, ways: dict[str, bool], effort: Effort) -> dict[str, list[float]]:
    """Return the times of a training in each round, of the model as it is and converted."""
    models: dict[str, nn.Module] = {}
    for way, trace in ways.items():
        models["plain"], models[way] = pair(subject, trace)
    return race({way: partial(subject.train, model) for way, model in models.items()}, effort)


def fused_and_kept(report: Report) -> tuple[str, str]:
    """Write what runs fused, one run a line, and what does not, one reason a line."""
    kept: dict[str, list[str]] = {}
    for entry in report:
        if entry.reason:
            kept.setdefault(entry.reason, []).extend(entry.names)
    fused = [" + ".join(entry.names) for entry in report if not entry.reason]
    return "\n".join(fused), "\n".join(f"{', '.join(names)}: {reason}" for reason, names in kept.items())


if __name__ == "__main__":
    main()
