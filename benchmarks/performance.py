"""docs/performance.md's measurements, from the files in benchmarks/results: `python -m benchmarks.performance`.

A file there is of one of three kinds: what `python -m benchmarks.report` writes as results.json, what
`python -m benchmarks.bars` writes, or tables as they were kept of earlier runs. Each names its machine, date and
command. The report's file is named after date and machine when it is put there.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"

#: What the command writes stands between these two lines of the page.
MARKS = ("<!-- written by python -m benchmarks.performance -->\n", "<!-- to here -->\n")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table in Markdown; what is no text of the first column goes to the right.

    Args:
        columns: the heads.
        rows: the cells, as many as there are heads.
    """
    yield f"| {' | '.join(columns)} |"
    yield "|---|" + "---:|" * (len(columns) - 1)
    for row in rows:
        yield f"| {' | '.join(row)} |"


def machine(results: dict[str, Any]) -> str:
    """Return in one sentence on what was measured, when and how."""
    described = results["machine"]
    if isinstance(described, str):
        named, torch, threads = described, results["torch"], results["threads"]
    else:
        named = f"{described['cpu']} ({described['isa']})"
        torch, threads = described["torch"], described["threads"]
    note = f", {results['note']}" if results.get("note") else ""
    day, command = results.get("date", "no date"), results.get("command", "python -m benchmarks.report")
    return f"{named}, {threads} thread{'s' if threads > 1 else ''}, torch {torch}, {day}{note}: `{command}`."


def kept(results: dict[str, Any]) -> Iterator[str]:
    """Yield the section of a file of tables."""
    yield from (f"### {results['title']}", "", machine(results), "")
    for one in results["tables"]:
        yield from (f"**{one['title']}.** {one['note']}".rstrip(), "", *table(one["columns"], one["rows"]), "")
    for note in results["notes"]:
        yield from (note, "")


def drawn(results: dict[str, Any]) -> Iterator[str]:
    """Yield the section of a file of bars."""
    yield from ("### The bars of the first page", "", machine(results), "")
    rows = [
        (
            bar["workload"],
            bar["way"],
            f"{bar['seconds'] * 1e6:,.1f}",
            f"{bar['speedup']:.2f}",
            f"{bar['low']:.2f} to {bar['high']:.2f}",
        )
        for bar in results["bars"]
    ]
    yield from (*table(("workload", "way", "us", "times PyTorch's speed", "quartiles"), rows), "")


def reported(results: dict[str, Any]) -> Iterator[str]:
    """Yield the section of a file that `benchmarks.report` wrote: a table for each suite."""
    yield from (f"### {results.get('title', 'The whole report')}", "", machine(results), "")
    for suite in dict.fromkeys(row["suite"] for row in results["rows"]):
        found = {(row["workload"], row["contender"]): row for row in results["rows"] if row["suite"] == suite}
        workloads = list(dict.fromkeys(workload for workload, _ in found))
        others = [name for name in dict.fromkeys(name for _, name in found) if name != "eager"]
        rows = [
            (
                workload,
                f"{found[workload, 'eager']['seconds'] * 1e6:,.1f}",
                *(f"{row['speedup']:.2f}" if (row := found.get((workload, name))) else "" for name in others),
            )
            for workload in workloads
        ]
        heads = (suite, "eager, us", *(f"{name} x" for name in others))
        yield from (*table(heads, rows), "")


def section(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of one file, whatever its kind.

    Raises:
        ValueError: for a file of no kind.
    """
    for key, write in (("tables", kept), ("bars", drawn), ("rows", reported)):
        if key in results:
            return write(results)
    raise ValueError(f"results have one of 'tables', 'bars' and 'rows', got {', '.join(results)}")


def generated(folder: Path = RESULTS) -> str:
    """Return what stands between the marks: the newest files first."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    files.sort(key=lambda results: str(results.get("date", "")) + str(results.get("title", "")), reverse=True)
    return "\n".join(line for results in files for line in section(results)) + "\n"


def write(page: str) -> str:
    """Return the page with what is generated in it anew.

    Raises:
        ValueError: for a page without the two marks.
    """
    before, first, rest = page.partition(MARKS[0])
    _, last, after = rest.partition(MARKS[1])
    if not last:
        raise ValueError(f"the page needs the lines {MARKS[0]!r} and {MARKS[1]!r}, one after the other")
    return f"{before}{first}\n{generated()}\n{last}{after}"


if __name__ == "__main__":
    PAGE.write_text(write(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
