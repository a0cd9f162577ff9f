"""What the demo shows: the network, tables of what was found out, and the curves of the losses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import fastmlp
from fastmlp.demo.tasks import ACCURACY, BATCH, DIGITS, SimpleNN, Task, cast, converted_nn, regression_tasks
from fastmlp.demo.training import CAPTURED, FAST, FROZEN, NATIVE, PREDICTED, STEPPED, Agreement, Race

__all__ = ["Result", "plot", "show_network", "show_results", "summary", "threads"]

# Each table has a line for each task, and fits into 80 columns.

CLOSENESS = (
    "of bound\nfastmlp",
    "\nTrainStep",
    "\nfrozen",
    "float64\nfastmlp",
    "\nTrainStep",
    "float32\nfastmlp",
    "\nTrainStep",
)
CLOSENESS_CAPTION = """
convert: the network of nn.Linear and torch.relu, fused by fastmlp.convert, trained with Adam.
of bound: in float64, asserted at every step: loss and all gradients differ from PyTorch's by no more than rounding \
explains (a running error analysis, see fastmlp/demo/bounds.py), after a TrainStep the parameters too, and at every \
epoch the outputs of PyTorch's network and of the same frozen. The largest share of the bound that was used: all of \
it, nearly, where Adam divides a gradient that is nothing but rounding by its own size.
float64, float32: the largest difference of two losses in steps from the same parameters; in float32 not asserted."""

SPEED = (
    "ms/epoch\nPyTorch",
    "\nfastmlp",
    "\nTrainStep",
    "\ncaptured",
    "ratio\nfastmlp",
    "\nTrainStep",
    "\ncaptured",
)
SPEED_CAPTION = f"""
ms/epoch: median, in turn, after a warm-up, {{threads}}, {BATCH} samples a step. fastmlp: the loop unchanged, on \
fastmlp's network; TrainStep: its four lines as one call, on PyTorch's network and optimizer; captured: the same lines \
as a function, recorded by fastmlp.capture. ratio: PyTorch's time over the other's."""

SERVING = ("held out\nPyTorch", "\nfastmlp", "\nTrainStep", "\ncaptured", "us/row\nPyTorch", "\nfrozen", "\nratio")
SERVING_CAPTION = f"""
held out: digits read rightly, asserted to be at least {ACCURACY:.0%}; for diabetes the mean squared error. Each of \
these trainings ran on its own, in float32.
us/row: a prediction of a single row, {PREDICTED} rows of the held-out data one after the other, median: PyTorch's \
network under no_grad, and the same frozen by fastmlp.freeze."""


@dataclass(frozen=True)
class Result:
    """All that was found out about one task."""

    task: Task
    float64: Agreement
    float32: Agreement
    race: Race


def show_network(console: Console, seed: int) -> None:
    """The tutorial's first steps: a network, its parameters, one forward pass; and what converting one fuses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SimpleNN()
    x, y = cast(regression_tasks()[0].train, torch.float32)
    console.print("\n[bold]The tutorial's network[/bold], with fastmlp.Linear for nn.Linear:")
    console.print(model)
    table = Table("parameter", "shape", box=None, pad_edge=False)
    for name, parameter in model.named_parameters():
        table.add_row(name, str(tuple(parameter.shape)))
    console.print(table)
    with torch.no_grad():
        output = model(x[:1])
    console.print(
        f"Forward pass, untrained: x {tuple(x[:1].shape)} -> output {tuple(output.shape)} = {output.item():.3f}, "
        f"target {y[0].item():.3f}"
    )
    console.print(f"The same with nn.Linear, after fastmlp.convert: {fastmlp.fusion_report(converted_nn())}\n")


def show_results(results: Sequence[Result], console: Console) -> None:
    """Prints the tables: how close it stayed to PyTorch, how fast it was learnt, and how it serves."""
    console.print(table_of(results, CLOSENESS, closeness_of, CLOSENESS_CAPTION), "")
    console.print(table_of(results, SPEED, speed_of, SPEED_CAPTION), "")
    console.print(table_of(results, SERVING, serving_of, SERVING_CAPTION))


def table_of(
    results: Sequence[Result], headers: Sequence[str], cells: Callable[[Result], list[str]], caption: str
) -> Table:
    """One row for each task."""
    table = Table(caption=caption.strip().format(threads=threads()), caption_justify="left", box=None, pad_edge=False)
    table.collapse_padding = True
    table.add_column("\ntraining", no_wrap=True)
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for result in results:
        table.add_row(result.task.name, *cells(result))
    return table


def closeness_of(result: Result) -> list[str]:
    """How close all stayed to PyTorch."""
    double, single = result.float64, result.float32
    shares = [f"{part.share:.1%}" for part in (double.loop, double.step, double.frozen)]
    parts = (double.loop, double.step, single.loop, single.step)
    return [*shares, *(f"{part.difference:.1e}" for part in parts)]


def speed_of(result: Result) -> list[str]:
    """How fast it was learnt."""
    names = (NATIVE, FAST, STEPPED, CAPTURED)
    times = [three_digits(1e3 * result.race.epoch(name)) for name in names]
    return [*times, *(three_digits(result.race.speedup(name)) for name in names[1:])]


def serving_of(result: Result) -> list[str]:
    """What was learnt, and how fast it is predicted."""
    score = "{:.1%}" if result.task.classifies else "{:.3f}"
    predictions = result.race.predictions
    return [
        *(score.format(contender.score()) for contender in result.race.contenders.values()),
        *(three_digits(1e6 * predictions[name]) for name in (NATIVE, FROZEN)),
        three_digits(result.race.speedup(FROZEN)),
    ]


def three_digits(value: float) -> str:
    """Three of a number from 1 to 999: 1.23, 12.3, 123."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def threads() -> str:
    """How many threads compute, in words."""
    count = torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"


def plot(results: Sequence[Result], path: Path) -> None:
    """Writes the loss curves: the regression's on the left, the classifiers' on the right."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    draw(left, [r for r in results if not r.task.classifies], "Diabetes: 10-50-1", "mean squared error")
    widths = "-".join(map(str, DIGITS))
    draw(right, [r for r in results if r.task.classifies], f"Handwritten digits: {widths}", "cross-entropy")
    right.set_yscale("log")
    figure.savefig(path, dpi=120)


def draw(axes: Axes, results: Sequence[Result], title: str, loss: str) -> None:
    """Curves of all contenders: fastmlp's dashes and the others' dots lie on PyTorch's broad, pale lines."""
    styles: dict[str, dict[str, Any]] = {
        NATIVE: {"alpha": 0.35, "linewidth": 5},
        FAST: {"linestyle": "--"},
        STEPPED: {"linestyle": ":", "linewidth": 2.5},
        CAPTURED: {"linestyle": "-.", "linewidth": 1},
    }
    for i, result in enumerate(results):
        name = result.task.name.split(", ")[1]
        for who, style in styles.items():
            losses = result.race.contenders[who].losses
            axes.plot(range(1, len(losses) + 1), losses, color=f"C{i}", label=f"{name}, {who}", **style)
    axes.set(title=title, xlabel="epoch", ylabel=f"training loss ({loss}), float32")
    axes.grid(alpha=0.3)
    axes.legend()


def summary(results: Sequence[Result]) -> str:
    """What was proved, in one line."""
    steps = sum(result.float64.steps for result in results)
    classifiers = [result.race for result in results if result.task.classifies]
    accuracy = min(run.contenders[name].score() for run in classifiers for name in (FAST, STEPPED, CAPTURED))
    loop, step, captured, frozen = (
        three_digits(geometric_mean([result.race.speedup(name) for result in results]))
        for name in (FAST, STEPPED, CAPTURED, FROZEN)
    )
    return (
        f"Proved: in {steps} float64 steps fastmlp equals PyTorch within rounding, in its loop, by TrainStep and "
        f"frozen, and reads {accuracy:.1%} of unseen digits or more; measured: {loop} times PyTorch's speed in the "
        f"loop, {step} by TrainStep, {captured} captured, {frozen} in predictions."
    )
