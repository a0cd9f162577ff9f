"""Figures as pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import matplotlib

matplotlib.use("Agg")  # no window

from matplotlib import pyplot as plt
from matplotlib.axis import Axis
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.contenders import NAMES, OWN, YARDSTICK
from benchmarks.machine import Machine
from benchmarks.timing import Row

#: Whose peaks and points are drawn, in which color and with which marker.
DTYPES = (("float32", "black", "o"), ("bfloat16", "tab:purple", "^"))

#: Of the contenders, in their order: those of eager and ours first.
PALETTE = (
    *("tab:gray", "tab:red", "tab:orange", "tab:green", "tab:blue"),
    *("tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "black"),
    *("red", "orange", "silver", "violet", "purple", "indigo"),
)
COLORS = dict(zip(NAMES, PALETTE, strict=True))


def roofline(rows: Sequence[Row], machine: Machine, path: Path) -> None:
    """Draw the rates of eager and ours against the operations for each byte, under what the machine can do."""
    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    intensities = sorted(row.intensity for row in rows)
    ends = (intensities[0] / 1.5, intensities[-1] * 1.5)
    read = machine.read_gbytes
    for name, color, _ in DTYPES:
        peak = machine.peak_gflops[name] * machine.threads
        corner = max(peak / read, ends[0])
        axes.plot((ends[0], corner, ends[1]), (ends[0] * read, corner * read, peak), color=color, lw=1)
        axes.annotate(f"{name}: {peak:.0f} GFLOP/s", (ends[1], peak), ha="right", va="bottom", color=color)
    axes.annotate(f"memory: {read:.1f} GB/s", (ends[0], ends[0] * read), rotation=35, va="bottom")
    for contender in (YARDSTICK, *OWN):
        for dtype, _, marker in DTYPES:
            found = [row for row in rows if (row.contender, row.dtype) == (contender, dtype)]
            places = [row.intensity for row in found], [row.gflops for row in found]
            if found:
                axes.scatter(*places, 18, COLORS[contender], marker=marker, label=f"{contender}, {dtype}")
    axes.set(
        xscale="log", yscale="log", xlabel="operations for each byte in or out", ylabel="GFLOP/s", title=str(machine)
    )
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plain(axis: Axis) -> None:
    """Label a logarithmic axis with numbers as one writes them."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def speedups(rows: Sequence[Row], machine: Machine, path: Path) -> None:
    """Draw the speed relative to eager, a line for each workload."""
    workloads = list(dict.fromkeys(row.workload for row in rows))
    figure, axes = plt.subplots(figsize=(10, 2 + 0.18 * len(workloads)), layout="constrained")
    for name in reversed(NAMES):  # so that ours lies on top
        found = [row for row in rows if row.contender == name and name != YARDSTICK]
        if found:
            size, marker = (40, "D") if name in OWN else (16, "o")
            places = [workloads.index(row.workload) for row in found]
            ratios = [row.speedup for row in found]
            axes.scatter(ratios, places, size, COLORS[name], marker=marker, label=name)
    axes.axvline(1, color="black", lw=1)
    axes.set(xscale="log", xlabel=f"x {YARDSTICK}", title=str(machine), ylim=(len(workloads), -1))
    _plain(axes.xaxis)
    axes.set_yticks(range(len(workloads)), workloads, fontsize=7)
    axes.grid(axis="x", which="both", lw=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def histogram(speedups: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw how often each speed relative to eager occurred.

    Args:
        speedups: by dtype.
        path: where to write.
    """
    edges = [2 ** (step / 4) for step in range(-8, 25)]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    inside = [[min(max(value, edges[0]), edges[-1]) for value in values] for values in speedups.values()]
    axes.hist(inside, edges, stacked=True, label=list(speedups))
    axes.axvline(1, color="black", lw=1)
    axes.set(xscale="log", xlabel=f"x {YARDSTICK}, the outermost bars with all beyond", ylabel="cases")
    _plain(axes.xaxis)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


class Account(Protocol):
    """A way to do something, with its parts in seconds."""

    @property
    def way(self) -> str: ...

    @property
    def parts(self) -> Mapping[str, float]: ...


def stacked(accounts: Mapping[str, Sequence[Account]], enlarged: str, path: Path) -> None:
    """Draw the parts of each way one after the other, and one way once more, enlarged.

    Args:
        accounts: by workload.
        enlarged: the way that is too short to be seen beside the others.
        path: where to write.
    """
    found = [(f"{account.way}\n{workload}", account) for workload, own in accounts.items() for account in own]
    few = [(label, account) for label, account in found if account.way == enlarged]
    names = list(dict.fromkeys(name for _, account in found for name in account.parts))
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    heights = [len(found), len(few) + 1]
    figure, panels = plt.subplots(2, figsize=(10, 2 + 0.5 * sum(heights)), height_ratios=heights, layout="constrained")
    for axes, shown in zip(panels, (found, few), strict=True):
        for place, (_, account) in enumerate(shown):
            left = 0.0
            for name, seconds in account.parts.items():
                width = max(seconds, 0) * 1e6  # a difference of two times may be off by more than it is
                axes.barh(place, width, left=left, color=colors[name])
                left += width
        axes.set_yticks(range(len(shown)), [label for label, _ in shown], fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="x", lw=0.3)
    panels[0].set(title="where a step goes")
    panels[1].set(xlabel="us", title=f"{enlarged}, enlarged: forward includes the loss")
    panels[0].legend(handles=[Patch(color=color, label=name) for name, color in colors.items()])
    figure.savefig(path, dpi=120)
    plt.close(figure)
