"""The demo: PyTorch's tutorial with `fastmlp`, beside PyTorch itself, on real data.

Run by `python -m fastmlp demo`. Networks and data are those of demo_tasks.py, trained as demo_training.py says: by
PyTorch's loop, by the same loop on fastmlp's network, and by `fastmlp.TrainStep`; then served frozen. Two things are
asserted, and a `DemoFailure` names what broke:

- In float64, at every step, fastmlp and PyTorch start from the same parameters and see the same
  batch. Their losses and every entry of their gradients differ by no more than rounding allows, as do
  the parameters after a `TrainStep` and the outputs of a frozen network. The bound is derived, not
  tuned: see demo_bounds.py.
- Each classifier reads at least `ACCURACY` of the digits that it was not trained on.

Starting each step from the same parameters keeps the bound sharp. Two runs left to themselves drift
apart by more than rounding, because each step amplifies the differences of the steps before it.
"""

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
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fastmlp
from fastmlp.demo_tasks import BATCH, DIGITS, SimpleNN, Task, cast, converted_nn, digits_tasks, regression_tasks
from fastmlp.demo_training import (
    FAST,
    FROZEN,
    NATIVE,
    PREDICTED,
    STEPPED,
    Agreement,
    DemoFailure,
    Race,
    compare,
    race,
)

__all__ = ["ACCURACY", "EPOCHS", "DemoFailure", "main"]

EPOCHS = 60
#: Of the comparison step by step, which costs several times a training: enough of it to see the end
#: of a training, when gradients have become small.
COMPARED_EPOCHS = 20
ACCURACY = 0.97

# What is shown. Each table has a line for each task, and fits into 80 columns.

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
explains (a running error analysis, see fastmlp/demo_bounds.py), after a TrainStep the parameters too, and at every \
epoch the outputs of PyTorch's network and of the same frozen. The largest share of the bound that was used: all of \
it, nearly, where Adam divides a gradient that is nothing but rounding by its own size.
float64, float32: the largest difference of two losses in steps from the same parameters; in float32 not asserted."""

SPEED = ("ms/epoch\nPyTorch", "\nfastmlp", "\nTrainStep", "ratio\nfastmlp", "\nTrainStep")
SPEED_CAPTION = f"""
ms/epoch: median, in turn, after a warm-up, {{threads}}, {BATCH} samples a step. fastmlp: the loop unchanged, on \
fastmlp's network; TrainStep: its four lines as one call, on PyTorch's network and optimizer. ratio: PyTorch's time \
over the other's."""

SERVING = ("held out\nPyTorch", "\nfastmlp", "\nTrainStep", "us/row\nPyTorch", "\nfrozen", "\nratio")
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


def measure(tasks: Sequence[Task], epochs: int, seed: int, console: Console) -> list[Result]:
    """Compares and times every task, behind a progress bar where there is a terminal."""
    columns = (TextColumn("{task.description:26}"), BarColumn(), TimeElapsedColumn())
    # Refreshed by hand between epochs: a thread that redraws the bar would run into the timings.
    bar = Progress(*columns, console=console, auto_refresh=False, transient=True, disable=not console.is_terminal)
    compared = min(epochs, COMPARED_EPOCHS)
    results = []
    with bar:
        progress = bar.add_task("", total=len(tasks) * (epochs + 2 * compared))

        def tick() -> None:
            bar.update(progress, advance=1, refresh=True)

        for task in tasks:
            bar.update(progress, description=task.name, refresh=True)
            float64 = compare(task, torch.float64, compared, seed, tick)
            float32 = compare(task, torch.float32, compared, seed, tick)
            results.append(Result(task, float64, float32, race(task, epochs, seed, tick)))
    return results


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
    names = (NATIVE, FAST, STEPPED)
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
    """Curves of all contenders: fastmlp's dashes and TrainStep's dots lie on PyTorch's broad, pale lines."""
    styles: dict[str, dict[str, Any]] = {
        NATIVE: {"alpha": 0.35, "linewidth": 5},
        FAST: {"linestyle": "--"},
        STEPPED: {"linestyle": ":", "linewidth": 2.5},
    }
    for i, result in enumerate(results):
        name = result.task.name.split(", ")[1]
        for who, style in styles.items():
            losses = result.race.contenders[who].losses
            axes.plot(range(1, len(losses) + 1), losses, color=f"C{i}", label=f"{name}, {who}", **style)
    axes.set(title=title, xlabel="epoch", ylabel=f"training loss ({loss}), float32")
    axes.grid(alpha=0.3)
    axes.legend()


def assert_accuracy(results: Sequence[Result]) -> None:
    """Asserts that each classifier learnt to read."""
    for result in results:
        for name, contender in result.race.contenders.items():
            if result.task.classifies and not contender.score() >= ACCURACY:
                raise DemoFailure(
                    f"{result.task.name}: {name} reads {contender.score():.1%} of the held-out digits, "
                    f"at least {ACCURACY:.0%} was expected"
                )


def summary(results: Sequence[Result]) -> str:
    """What was proved, in one line."""
    steps = sum(result.float64.steps for result in results)
    classifiers = [result.race for result in results if result.task.classifies]
    accuracy = min(run.contenders[name].score() for run in classifiers for name in (FAST, STEPPED))
    loop, step, frozen = (
        three_digits(geometric_mean([result.race.speedup(name) for result in results]))
        for name in (FAST, STEPPED, FROZEN)
    )
    return (
        f"Proved: in {steps} float64 steps fastmlp equals PyTorch within rounding, in its loop, by TrainStep and "
        f"frozen, and reads {accuracy:.1%} of unseen digits or more; measured: {loop} times PyTorch's speed in the "
        f"loop, {step} by TrainStep, {frozen} in predictions."
    )


def main(output: Path = Path("out"), epochs: int = EPOCHS, seed: int = 0) -> None:
    """Runs the demo.

    Args:
        output: folder for `demo.png`, made if missing.
        epochs: number of passes over the data in each training.
        seed: of parameters and batches.

    Raises:
        DemoFailure: if something that the demo asserts does not hold.
        OSError: if the folder cannot be made or written to.
    """
    output.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is told at once
    console = Console(highlight=False)
    console.print(
        f"fastmlp {fastmlp.__version__} ({fastmlp.get_isa()}), torch {torch.__version__}, {threads()}, "
        f"{epochs} epochs, seed {seed}"
    )
    show_network(console, seed)
    results = measure(regression_tasks() + digits_tasks(), epochs, seed, console)
    console.print(table_of(results, CLOSENESS, closeness_of, CLOSENESS_CAPTION), "")
    console.print(table_of(results, SPEED, speed_of, SPEED_CAPTION), "")
    console.print(table_of(results, SERVING, serving_of, SERVING_CAPTION))
    path = output / "demo.png"
    plot(results, path)
    console.print(f"\nLoss curves: {path}", soft_wrap=True)
    assert_accuracy(results)
    console.print(summary(results), soft_wrap=True)
