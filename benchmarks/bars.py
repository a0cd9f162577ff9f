"""README's picture: three networks, in every way that they can be trained and served, as bars.

`taskset -c 1 python -m benchmarks.bars` measures (under two minutes on an idle core), writes
benchmarks/results/bars.json, draws docs/pictures/speed.png, and writes the line below it in README.md and the tables of
docs/performance.md anew. With `--draw` it draws what was measured before. Every result is checked against float64
before it is timed, as everywhere in benchmarks.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from hashlib import sha256
from pathlib import Path
from statistics import median, quantiles
from typing import Any, ClassVar

import fastmlp
from benchmarks import performance
from benchmarks.check import verify
from benchmarks.contenders import YARDSTICK, Contender
from benchmarks.contenders.pytorch import Eager, Fastmlp, FastmlpOptim, Frozen, TrainStep
from benchmarks.contenders.runtimes import OnnxRuntime
from benchmarks.machine import describe
from benchmarks.targets import find
from benchmarks.workloads import Task, Workload
from fastmlp.benchmark.timing import Effort, race

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "bars.json"
PICTURE = ROOT / "docs" / "pictures" / "speed.png"

OPTIMIZERS = {"adam": "Adam", "sgd": "SGD"}

#: In README.md the line that this command writes stands between these two.
MARKS = ("<!-- written by python -m benchmarks.bars -->\n", "<!-- to here -->\n")

EFFORT = Effort(rounds=21, patience=8.0, fewest=5)


class CapturedLoop(Eager):
    """PyTorch's own modules and optimizer, and the four lines of the loop as a captured function."""

    name = "capture"
    ours = True
    tasks: ClassVar[tuple[Task, ...]] = ("step",)

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.run = fastmlp.capture(super().step)

    def step(self) -> Any:
        return self.run()


#: What is drawn: how a network is used, the workloads, and the ways with the words that stand beside their bars.
PANELS: tuple[tuple[str, tuple[str, ...], dict[type[Contender], str]], ...] = (
    (
        "training: one step",
        # Of the wide network with SGD, because that is where there is least to gain.
        ("tutorial b32 step adam", "mnist b128 step adam", "wide b1024 step sgd"),
        {
            Eager: "PyTorch",
            Fastmlp: "the loop, fastmlp's layers",
            FastmlpOptim: "and fastmlp.optim",
            TrainStep: "TrainStep",
            CapturedLoop: "capture, PyTorch's layers",
        },
    ),
    (
        "serving: one row",
        ("tutorial b1 infer", "mnist b1 infer", "wide b1 infer"),
        {Eager: "PyTorch", Fastmlp: "fastmlp's layers", Frozen: "frozen", OnnxRuntime: "ONNX Runtime"},
    ),
)


@dataclass(frozen=True)
class Bar:
    """One way to run one workload.

    Attributes:
        workload: its name.
        widths: of the network.
        batch: rows.
        way: as it is written beside the bar.
        seconds: median time of a call.
        speedup: median over the rounds of eager's time divided by this one's.
        low: first quartile of the same.
        high: third quartile of the same.
    """

    workload: str
    widths: tuple[int, ...]
    batch: int
    way: str
    seconds: float
    speedup: float
    low: float
    high: float


def bars(workload: Workload, ways: dict[type[Contender], str], effort: Effort) -> list[Bar]:
    """Check each way on a workload, then time them all, interleaved.

    Raises:
        AssertionError: if a result is wrong.
        ModuleNotFoundError: if the package of a way is not installed, since no bar may be missing.
    """
    for kind in ways:
        if absent := kind.missing():
            raise ModuleNotFoundError(f"{ways[kind]} needs {', '.join(absent)}: pip install onnx onnxruntime")
        verify(kind(workload))
    samples = race({kind.name: kind(workload).call for kind in ways}, effort)
    found = []
    for kind, way in ways.items():
        own = samples[kind.name]
        ratios = [eager / time for eager, time in zip(samples[YARDSTICK], own, strict=True)]
        low, speedup, high = quantiles(ratios, n=4, method="inclusive")
        shape = (workload.name, workload.net.widths, workload.batch, way)
        found.append(Bar(*shape, median(own), speedup, low, high))
    return found


def measure(effort: Effort, note: str) -> dict[str, Any]:
    """Measure all that is drawn, with one thread.

    Args:
        effort: how long to try.
        note: what a reader has to know of the machine, such as "busy".
    """
    machine = describe(threads=1)
    found = [bar for _, names, ways in PANELS for work in find(names) for bar in bars(work, ways, effort)]
    return {
        "command": "python -m benchmarks.bars",
        "date": date.today().isoformat(),
        "note": note,
        "machine": asdict(machine),
        "bars": [asdict(bar) for bar in found],
    }


def caption(results: dict[str, Any]) -> str:
    """Return the line that stands below the picture: on what it was measured, when and how."""
    machine, note = results["machine"], results["note"]
    return (
        f"One thread, {machine['cpu']} ({machine['isa']}), torch {machine['torch']}, {results['date']}"
        f"{f', {note}' if note else ''}: `{results['command']}`. Longer is faster, and red is slower than PyTorch.\n"
    )


def numbered(path: Path) -> str:
    """Return what tells one file of results from another. The picture carries it, so that a test can compare."""
    return sha256(path.read_bytes()).hexdigest()


def draw(results: dict[str, Any], path: Path, number: str) -> None:
    """Draw the bars, which begin at PyTorch's speed.

    Args:
        results: as `measure` returned them.
        path: where to write.
        number: of the results.
    """
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot as plt

    columns = max(len(names) for _, names, _ in PANELS)
    heights = [len(ways) + 1.2 for *_, ways in PANELS]
    figure, grid = plt.subplots(
        len(PANELS), columns, figsize=(11, 4.8), sharex=True, height_ratios=heights, layout="constrained"
    )
    for line, (title, names, _) in enumerate(PANELS):
        for axes, name in zip(grid[line], names, strict=True):
            _panel(axes, [bar for bar in results["bars"] if bar["workload"] == name])
        for axes in grid[line][1:]:
            axes.set_yticklabels([])
        grid[line][0].set_title(title, loc="left", fontsize=10, fontweight="bold", pad=30)
    for axes in grid[-1]:
        axes.set_xlabel("times PyTorch's speed", fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Description": number, "Software": ""})
    plt.close(figure)


def _panel(axes: Any, found: Sequence[dict[str, Any]]) -> None:
    eager, *_ = found
    widths, rows = "-".join(map(str, eager["widths"])), eager["batch"]
    used = next((f", {name}" for word, name in OPTIMIZERS.items() if word in eager["workload"].split()), "")
    head = f"{widths}, {rows} row{'s' if rows > 1 else ''}{used}\nPyTorch takes {_time(eager['seconds'])}"
    axes.text(0, 1.03, head, transform=axes.transAxes, fontsize=8)
    axes.set_xscale("log")
    for place, bar in enumerate(found):
        speed = bar["speedup"]
        color = "tab:gray" if bar is eager or "ONNX" in bar["way"] else "tab:green" if speed >= 1 else "tab:red"
        axes.barh(place, speed - 1, left=1, color=color, height=0.7)
        label = "1" if bar is eager else f"{speed:.2f}" if speed < 1.995 else f"{speed:.1f}"
        axes.annotate(label, (max(speed, 1), place), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.axvline(1, color="black", lw=0.8)
    axes.set(xlim=(0.5, 200), yticks=range(len(found)))
    axes.set_yticklabels([bar["way"] for bar in found], fontsize=8)
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], ["1", "2", "5", "10", "20", "50", "100"], fontsize=7)
    axes.minorticks_off()
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.2g} s"


def main() -> None:
    """Measure and draw what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bars", description=__doc__)
    parser.add_argument("--draw", action="store_true", help="draw what was measured before")
    parser.add_argument("--note", default="", help='what a reader has to know of the machine, such as "busy"')
    options = parser.parse_args()
    if not options.draw:
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(measure(EFFORT, options.note), indent=2) + "\n", encoding="utf-8")
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for bar in results["bars"]:
        spread = f"({bar['low']:.2f} to {bar['high']:.2f})"
        print(f"{bar['workload']:24} {bar['way']:28} {bar['seconds'] * 1e6:10,.1f} us  x {bar['speedup']:.2f} {spread}")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    draw(results, PICTURE, numbered(RESULTS))
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    if not mark:
        raise SystemExit(f"README.md has no place for the line below the picture: {MARKS[0]}...{MARKS[1]}")
    readme.write_text(f"{before}{MARKS[0]}{caption(results)}{mark}{after}", encoding="utf-8")
    performance.PAGE.write_text(performance.write(performance.PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
