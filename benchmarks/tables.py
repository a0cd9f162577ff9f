"""Figures as tables on a terminal or in a file."""

from collections.abc import Iterator, Sequence
from typing import get_args

from rich.console import Console
from rich.table import Table

from benchmarks.contenders import CONTENDERS, YARDSTICK
from benchmarks.machine import Machine
from benchmarks.timing import Row
from benchmarks.workloads import Suite


def console() -> Console:
    """Return standard output, without a right edge where that is a file."""
    made = Console()
    if not made.is_terminal:
        made.width = 400
    return made


def tables(rows: Sequence[Row], machine: Machine) -> Iterator[Table]:
    """Yield a table for each suite, with a line for each workload and columns for each contender."""
    for suite in get_args(Suite):
        found = [row for row in rows if row.suite == suite]
        if found:
            yield _table(found, f"{suite}: {machine}", machine.limits)


def _table(rows: Sequence[Row], title: str, caption: str) -> Table:
    table = Table("workload", title=title, caption=caption)
    names = [kind.name for kind in CONTENDERS if any(row.contender == kind.name for row in rows)]
    for name in names:
        table.add_column(f"{name}, us", justify="right")
        table.add_column("GFLOP/s (of peak)", justify="right")
        if name != YARDSTICK:
            table.add_column(f"x {YARDSTICK} (quartiles)", justify="right")
    for workload in dict.fromkeys(row.workload for row in rows):
        found = {row.contender: row for row in rows if row.workload == workload}
        table.add_row(workload, *(cell for name in names for cell in _cells(name, found.get(name))))
    return table


def _cells(name: str, row: Row | None) -> list[str]:
    if row is None:
        return [""] * (2 if name == YARDSTICK else 3)
    cells = [f"{row.seconds * 1e6:.1f}", f"{row.gflops:.1f} ({row.share:.0%})"]
    return cells if name == YARDSTICK else [*cells, _speedup(row)]


def _speedup(row: Row) -> str:
    color = "green" if row.low > 1 else "red" if row.high < 1 else "yellow"
    return f"[{color}]{row.speedup:.2f}[/] ({row.low:.2f}-{row.high:.2f})"
