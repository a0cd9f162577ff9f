"""Contenders side by side on chosen workloads, as `benchmarks.timing` measures them."""

import argparse
import json
import re
from dataclasses import asdict
from pathlib import Path

from rich.progress import track

from benchmarks.contenders import absent, versions
from benchmarks.machine import describe
from benchmarks.tables import console, tables
from benchmarks.timing import measure
from benchmarks.workloads import SUITES, Tier, works
from fastmlp.benchmark.timing import Effort


def main() -> None:
    """Compare what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of PyTorch and all contenders (1)")
    parser.add_argument("--suite", choices=SUITES, help="one suite instead of all")
    parser.add_argument("--match", default="", metavar="REGEX", help="only workloads with it in their names")
    parser.add_argument("--rounds", type=int, default=31, metavar="N", help="at most, 2 or more (31)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="to write the rows to")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="tier", action="store_const", const=Tier.QUICK, help="fewer workloads")
    size.add_argument("--full", dest="tier", action="store_const", const=Tier.FULL, help="all workloads")
    parser.set_defaults(tier=Tier.DEFAULT)
    options = parser.parse_args()

    out, machine = console(), describe(options.threads)
    for line in absent():
        out.print(line)
    suites = [options.suite] if options.suite else SUITES
    workloads = [w for suite in suites for w in works(suite, options.tier) if re.search(options.match, w.name)]
    steps = track(workloads, description="workloads", console=out, transient=True)
    effort = Effort(rounds=options.rounds)
    measured = [measure(workload, options.threads, effort) for workload in steps]
    rows = [row for found, _ in measured for row in found]
    for table in tables(rows, machine, [refusal for _, refused in measured for refusal in refused]):
        out.print(table)
    if options.json:
        report = {"machine": asdict(machine), "versions": versions(), "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
