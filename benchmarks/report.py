"""All there is to say about speed: every contender on every workload, random shapes, and which targets are met."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from rich.progress import track
from rich.table import Table

from benchmarks import costs, random_shapes
from benchmarks.contenders import absent
from benchmarks.machine import describe
from benchmarks.plots import roofline, speedups
from benchmarks.tables import console, tables
from benchmarks.targets import CLAIMS, Outcome, find, judge
from benchmarks.timing import Effort, measure
from benchmarks.workloads import Suite, Tier, Workload, select

#: The id of the random shapes, among those of the targets.
RANDOM = "random"


def main() -> None:
    """Report what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="only what targets name, fewer rounds, fewer random shapes"
    )
    parser.add_argument("--only", metavar="IDS", help="targets, with commas between them: P1,P4,random")
    parser.add_argument("--build", action="store_true", help="time the build too, which takes minutes of all cores")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random shapes (0)")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), metavar="FOLDER", help="for files (out/bench)")
    options = parser.parse_args()

    effort = Effort(rounds=9, patience=0.5) if options.quick else Effort(rounds=21, patience=3.0)
    measures: dict[str, Callable[[], Iterator[Outcome]]] = {
        "P12": lambda: costs.threads(effort),
        "P13": costs.memory,
        "P14": lambda: costs.overhead(options.build),
        "P15": lambda: costs.growth(effort),
    }
    known = [*dict.fromkeys(claim.id for claim in CLAIMS), *measures, RANDOM]
    wanted = options.only.split(",") if options.only else known
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"--only takes {', '.join(known)}, got {', '.join(unknown)}")

    out, machine = console(), describe(threads=1)
    for line in absent():
        out.print(line)
    options.out.mkdir(parents=True, exist_ok=True)

    workloads = _workloads(wanted, every=not options.quick and not options.only)
    steps = track(workloads, description="workloads", console=out, transient=True)
    rows = [row for workload in steps for row in measure(workload, machine.threads, effort)]
    for table in tables(rows, machine):
        out.print(table)
    if rows:
        roofline(rows, machine, options.out / "roofline.png")
        speedups(rows, machine, options.out / "speedup.png")

    outcomes = list(judge(rows, wanted))
    for name in track([name for name in measures if name in wanted], description="costs", console=out, transient=True):
        outcomes += measures[name]()
    if RANDOM in wanted:
        cases = list(random_shapes.draw(20 if options.quick else 200, options.seed))
        drawn = track(cases, description="random shapes", console=out, transient=True)
        results = list(random_shapes.measure(drawn))
        random_shapes.report(results, f"random shapes, seed {options.seed}: {machine}", out, options.out)
        outcomes.append(random_shapes.judge(results, RANDOM))
    out.print(_table(outcomes, str(machine)))

    report = {"machine": asdict(machine), "rows": [asdict(r) for r in rows], "targets": [asdict(o) for o in outcomes]}
    (options.out / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    out.print(f"plots and results are in {options.out}")


def _workloads(wanted: Sequence[str], every: bool) -> list[Workload]:
    """Return what the targets name and, if asked for, every other workload that is not for the full tier only."""
    named = find([name for claim in CLAIMS if claim.id in wanted for name in claim.workloads])
    if not every:
        return named
    others = [workload for suite in get_args(Suite) for workload in select(suite, Tier.DEFAULT)]
    return list(dict.fromkeys([*others, *named]))


def _table(outcomes: Sequence[Outcome], title: str) -> Table:
    table = Table("target", "what", "goal", "measured", "", "where", title=f"targets: {title}")
    words = {True: "[green]met[/]", False: "[red]missed[/]", None: "[yellow]open[/]"}
    for outcome in outcomes:
        table.add_row(outcome.id, outcome.what, outcome.goal, outcome.measured, words[outcome.met], outcome.where)
    return table


if __name__ == "__main__":
    main()
