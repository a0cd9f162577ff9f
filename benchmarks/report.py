"""All there is to say about speed: every contender on every workload, random shapes, and which targets are met."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from rich.progress import track
from rich.table import Table

from benchmarks import capture_targets, costs, data, random_layers, random_nets, random_shapes
from benchmarks.capture_targets import CAPTURE_CLAIMS
from benchmarks.contenders import absent, versions
from benchmarks.machine import describe
from benchmarks.plots import roofline, speedups
from benchmarks.random_shapes import RANDOM
from benchmarks.tables import console, tables
from benchmarks.targets import CLAIMS, Claim, Outcome, find, judge
from benchmarks.timing import Refusal, Row, measure
from benchmarks.workloads import Suite, Tier, Training, Work, select
from fastmlp.benchmark.timing import Effort


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

    effort = Effort(rounds=9, patience=0.5, fewest=3) if options.quick else Effort(rounds=21, patience=3.0)
    measures: dict[str, Callable[[], Iterator[Outcome]]] = {
        "P12": lambda: costs.threads(effort),
        "P13": costs.memory,
        "P14": lambda: costs.overhead(options.build),
        "P15": lambda: costs.growth(effort),
        "C9": lambda: data.data(effort),
        **capture_targets.measures(effort),
    }
    claims = (*CLAIMS, *CAPTURE_CLAIMS)
    known = [*dict.fromkeys(claim.id for claim in claims), *measures, RANDOM]
    wanted = options.only.split(",") if options.only else known
    if unknown := [name for name in wanted if name not in known]:
        parser.error(f"--only takes {', '.join(known)}, got {', '.join(unknown)}")

    out, machine = console(), describe(threads=1)
    for line in absent():
        out.print(line)
    options.out.mkdir(parents=True, exist_ok=True)

    rows: list[Row] = []
    refusals: list[Refusal] = []
    wrong = []
    for suite, workloads in _workloads(wanted, options.quick, every=not options.quick and not options.only).items():
        found: list[Row] = []
        for workload in track(workloads, description=suite, console=out, transient=True):
            try:
                measured, refused = measure(workload, machine.threads, effort)
            except AssertionError as error:
                wrong.append(str(error))
            else:
                found += measured
                refusals += refused
        for table in tables(found, machine, refusals):
            out.print(table)
        rows += found
    if rows:
        roofline(rows, machine, options.out / "roofline.png")
        speedups(rows, machine, options.out / "speedup.png")

    outcomes = list(judge(rows, wanted, claims))
    for name in track([name for name in measures if name in wanted], description="costs", console=out, transient=True):
        outcomes += measures[name]()
    if RANDOM in wanted:
        layers = list(random_layers.draw(20 if options.quick else 200, options.seed))
        nets = list(random_nets.draw_nets(10 if options.quick else 60, options.seed))
        outcomes += random_shapes.every_way(layers, nets, machine.threads, out, options.out)
    out.print(_table(outcomes, str(machine)))

    report = {
        "machine": asdict(machine),
        "versions": versions(),
        "rows": [asdict(row) for row in rows],
        "refusals": [asdict(refusal) for refusal in refusals],
        "targets": [asdict(outcome) for outcome in outcomes],
    }
    (options.out / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    out.print(f"plots and results are in {options.out}")
    if wrong:
        raise SystemExit("\n".join(("results that are wrong, and so have no speed:", *wrong)))


def _workloads(wanted: Sequence[str], quick: bool, every: bool) -> dict[str, list[Work]]:
    """Return what the targets name and, if asked for, all else that is not for the full tier only, by suite."""

    def names(claims: Sequence[Claim]) -> list[str]:
        return list(dict.fromkeys(name for claim in claims if claim.id in wanted for name in claim.workloads))

    named = find(names(CLAIMS))
    suites: dict[str, list[Work]] = {}
    for suite in get_args(Suite):
        own = [workload for workload in named if workload.suite == suite]
        suites[suite] = list(dict.fromkeys([*(select(suite, Tier.DEFAULT) if every else []), *own]))
    # The claims name all programs there are.
    tier = Tier.QUICK if quick else Tier.FULL
    return {**suites, Training.suite: [Training(name, tier) for name in names(CAPTURE_CLAIMS)]}


def _table(outcomes: Sequence[Outcome], title: str) -> Table:
    table = Table("target", "what", "goal", "measured", "", "where", title=f"targets: {title}")
    words = {True: "[green]met[/]", False: "[red]missed[/]", None: "[yellow]open[/]"}
    for outcome in outcomes:
        table.add_row(outcome.id, outcome.what, outcome.goal, outcome.measured, words[outcome.met], outcome.where)
    return table


if __name__ == "__main__":
    main()
