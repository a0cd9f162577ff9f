"""What was measured of one model: printed as tables, written as JSON, drawn as bars."""

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Table

from fastmlp.benchmark.contest import YARDSTICK, Refusal, Row

__all__ = ["NOISY", "Report", "check_writable"]

#: A machine is noisy where the quartiles of a contender's times are further apart than this part of their median.
NOISY = 0.2


@dataclass(frozen=True)
class Report:
    """What `fastmlp.bench` found. Printed, it is tables.

    Attributes:
        about: what was measured, on which machine and with which versions, and when.
        rows: a contender each, by task and batch.
        refusals: who could not take part, and why.
    """

    about: dict[str, str]
    rows: tuple[Row, ...]
    refusals: tuple[Refusal, ...]

    @classmethod
    def joined(cls, model: str, reports: Sequence[Self]) -> Self:
        """One report of several on the same model, such as for other batches.

        Args:
            model: what it is called.
            reports: at least one; what it was measured on is said by the first.
        """
        rows = tuple(row for report in reports for row in report.rows)
        refusals = tuple(refusal for report in reports for refusal in report.refusals)
        return cls({**reports[0].about, "model": model}, rows, refusals)

    @property
    def warning(self) -> str | None:
        """What to know before these figures are passed on, if the machine was noisy; else None."""
        noisy = [row for row in self.rows if row.spread > NOISY]
        if not noisy:
            return None
        worst = max(noisy, key=lambda row: row.spread)
        return (
            f"The machine is noisy: of {len(noisy)} of {len(self.rows)} times the quartiles are more than {NOISY:.0%} "
            f"of the median apart, at most {worst.spread:.0%} ({worst.contender}, {worst.task}, batch {worst.batch}). "
            "Contenders took turns, so that ratios say more than times. End what else runs, or measure again."
        )

    def show(self, console: Console) -> None:
        """Prints all of it."""
        for name, value in self.about.items():
            console.print(f"{name}: {value}", highlight=False, markup=False)
        for task, batch in dict.fromkeys((row.task, row.batch) for row in self.rows):
            console.print(self._table(task, batch))
        for reason, names in self._refused().items():
            console.print(f"without {names}: {reason}", highlight=False, markup=False, soft_wrap=True)
        if self.warning is not None:
            console.print(self.warning, style="bold", highlight=False, markup=False, soft_wrap=True)

    def _table(self, task: str, batch: int) -> Table:
        table = Table(title=f"{task}, batch {batch}", title_justify="left")
        table.add_column("contender")
        for column in ("microseconds", "quartiles", f"times {YARDSTICK}"):
            table.add_column(column, justify="right")
        for row in self.rows:
            if (row.task, row.batch) == (task, batch):
                times = f"{row.microseconds:.2f}", f"{row.low:.2f} to {row.high:.2f}", f"{row.speedup:.2f}"
                table.add_row(row.contender, *times)
        return table

    def _refused(self) -> dict[str, str]:
        """Reasons, and for whom, each once."""
        found: dict[str, list[str]] = {}
        for refusal in self.refusals:
            name = f"{refusal.contender} ({refusal.task})"
            if name not in found.setdefault(refusal.reason, []):
                found[refusal.reason].append(name)
        return {reason: ", ".join(names) for reason, names in found.items()}

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=100)
        self.show(console)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text.rstrip()

    __repr__ = __str__

    def save(self, path: str | Path) -> None:
        """Writes all of it as JSON.

        Args:
            path: the file, whose folder is made if it is not there.

        Raises:
            OSError: if it cannot be written.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = {"rows": [asdict(row) for row in self.rows], "refusals": [asdict(one) for one in self.refusals]}
        text = json.dumps({"about": self.about, "warning": self.warning, **parts}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")

    def draw(self, path: str | Path) -> None:
        """Draws a panel of bars for each task and batch: the microseconds of each contender, and their quartiles.

        Args:
            path: a file whose ending Matplotlib knows, such as .png; its folder is made if it is not there.

        Raises:
            ModuleNotFoundError: without Matplotlib.
            OSError: if it cannot be written.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        panels = list(dict.fromkeys((row.task, row.batch) for row in self.rows))
        counts = [sum((row.task, row.batch) == panel for row in self.rows) for panel in panels]
        figure = Figure(figsize=(8, 1.2 + sum(0.8 + 0.3 * count for count in counts)), layout="constrained")
        FigureCanvasAgg(figure)  # no window
        axes = figure.subplots(len(panels), squeeze=False, height_ratios=counts)[:, 0]
        for axis, (task, batch) in zip(axes, panels, strict=True):
            self._draw(axis, [row for row in self.rows if (row.task, row.batch) == (task, batch)])
            axis.set_title(f"{task}, batch {batch}", loc="left", fontsize=10)
        axes[-1].set_xlabel("microseconds of a call, shorter is better")
        about = self.about
        figure.suptitle(
            f"{about['model']}, {about['dtype']}, threads: {about['threads']}\n{about['processor']}, torch "
            f"{about['torch']}, {about['date'][:10]}",
            fontsize=9,
        )
        figure.savefig(path, dpi=120)

    @staticmethod
    def _draw(axis: Any, rows: Sequence[Row]) -> None:
        colors = ["tab:gray" if row.contender == YARDSTICK else "tab:blue" for row in rows]
        peers = ("onnxruntime", "openvino", "jax")
        colors = ["silver" if row.contender in peers else color for row, color in zip(rows, colors, strict=True)]
        times = [row.microseconds for row in rows]
        errors = [[row.microseconds - row.low for row in rows], [row.high - row.microseconds for row in rows]]
        bars = axis.barh([row.contender for row in rows], times, xerr=errors, color=colors)
        labels = [f" {row.microseconds:.4g}  ({row.speedup:.2f} x)" for row in rows]
        axis.bar_label(bars, labels, fontsize=8)
        axis.margins(x=0.25)
        axis.invert_yaxis()


def check_writable(path: Path) -> None:
    """Raises, before anything is measured, if a file cannot be written; makes its folder.

    Raises:
        OSError: with what the system says.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    existed = path.exists()
    with path.open("ab"):
        pass
    if not existed:
        path.unlink()
