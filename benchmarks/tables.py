"""Figures as tables on a terminal or in a file."""

from collections.abc import Iterator, Sequence
from typing import get_args

from rich.console import Console
from rich.table import Table

from benchmarks.contenders import CONTENDERS, OURS, YARDSTICK
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
    """Yield a table for each suite, with a line for each workload."""
    for suite in get_args(Suite):
        found = [row for row in rows if row.suite == suite]
        if found:
            yield _table(found, f"{suite}: {machine}", machine.limits)


def _table(rows: Sequence[Row], title: str, caption: str) -> Table:
    """Write eager and ours in full, and of the others their speed."""
    peers = [kind.name for kind in CONTENDERS if kind.name not in (YARDSTICK, OURS)]
    peers = [name for name in peers if any(row.contender == name for row in rows)]
    table = Table("workload", title=title, caption=f"{caption}; in brackets: share of that peak")
    for name in (
        *(f"{YARDSTICK}, us", "GFLOP/s"),
        *(f"{OURS}, us", "GFLOP/s", f"x {YARDSTICK} (quartiles)"),
        *(["x best peer"] if peers else []),
        *(f"{name}, x {YARDSTICK}" for name in peers),
    ):
        table.add_column(name, justify="right")
    for workload in dict.fromkeys(row.workload for row in rows):
        found = {row.contender: row for row in rows if row.workload == workload}
        ours = found[OURS]
        cells = [*_rate(found[YARDSTICK]), *_rate(ours), _speedup(ours)]
        if peers:
            best = min((ratio for name, ratio in ours.ratios.items() if name in peers), default=None)
            cells.append("" if best is None else f"[{'green' if best >= 1 else 'red'}]{best:.2f}[/]")
        others = (found.get(name) for name in peers)
        cells += [f"{row.speedup:.2f} ({row.share:.0%})" if row else "" for row in others]
        table.add_row(workload, *cells)
    return table


def _rate(row: Row) -> tuple[str, str]:
    return f"{row.seconds * 1e6:.1f}", f"{row.gflops:.1f} ({row.share:.0%})"


def _speedup(row: Row) -> str:
    color = "green" if row.low > 1 else "red" if row.high < 1 else "yellow"
    return f"[{color}]{row.speedup:.2f}[/] ({row.low:.2f}-{row.high:.2f})"
