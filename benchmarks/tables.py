"""Figures as tables on a terminal or in a file."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.contenders import NAMES, OWN, YARDSTICK
from benchmarks.machine import Machine
from benchmarks.timing import Refusal, Row
from benchmarks.workloads import SUITES


def console() -> Console:
    """Return standard output, without a right edge where that is a file."""
    made = Console()
    if not made.is_terminal:
        made.width = 400
    return made


def tables(rows: Sequence[Row], machine: Machine, refusals: Sequence[Refusal] = ()) -> Iterator[Table]:
    """Yield a table for each suite, with a line for each workload, and below it who refused what and why."""
    for suite in SUITES:
        found = [row for row in rows if row.suite == suite]
        if found:
            yield _table(found, f"{suite}: {machine}", _caption(machine, [r for r in refusals if r.suite == suite]))


def _caption(machine: Machine, refusals: Sequence[Refusal]) -> str:
    lines = [f"{machine.limits}; in brackets: share of that peak"]
    for contender, reason in dict.fromkeys((refusal.contender, refusal.reason) for refusal in refusals):
        names = [r.workload for r in refusals if (r.contender, r.reason) == (contender, reason)]
        lines.append(f"{contender} cannot run {', '.join(names)}: {escape(reason)}")
    return "\n".join(lines)


def _table(rows: Sequence[Row], title: str, caption: str) -> Table:
    """Write eager and ours in full, and of the others their speed."""
    present = [name for name in NAMES if any(row.contender == name for row in rows)]
    own = [name for name in present if name in OWN]
    peers = [name for name in present if name not in (YARDSTICK, *OWN)]
    table = Table("workload", title=title, caption=caption, caption_justify="left")
    for name in (YARDSTICK, *own):
        table.add_column(f"{name}, us", justify="right")
        table.add_column("GFLOP/s", justify="right")
        if name in own:
            table.add_column(f"x {YARDSTICK} (quartiles)", justify="right")
        if name in own and peers:
            table.add_column("x best peer", justify="right")
    for name in peers:
        table.add_column(f"{name}, x {YARDSTICK}", justify="right")
    for workload in dict.fromkeys(row.workload for row in rows):
        found = {row.contender: row for row in rows if row.workload == workload}
        cells = [*_rate(found[YARDSTICK])]
        for name in own:
            row = found.get(name)
            cells += [*_rate(row), _speedup(row)] if row else [""] * 3
            if peers:
                cells.append(_best(row, peers) if row else "")
        others = (found.get(name) for name in peers)
        cells += [f"{row.speedup:.2f} ({row.share:.0%})" if row else "" for row in others]
        table.add_row(workload, *cells)
    return table


def _rate(row: Row) -> tuple[str, str]:
    return f"{row.seconds * 1e6:.1f}", f"{row.gflops:.1f} ({row.share:.0%})"


def _best(row: Row, peers: Sequence[str]) -> str:
    best = min((ratio for name, ratio in row.ratios.items() if name in peers), default=None)
    return "" if best is None else f"[{'green' if best >= 1 else 'red'}]{best:.2f}[/]"


def _speedup(row: Row) -> str:
    color = "green" if row.low > 1 else "red" if row.high < 1 else "yellow"
    return f"[{color}]{row.speedup:.2f}[/] ({row.low:.2f}-{row.high:.2f})"
