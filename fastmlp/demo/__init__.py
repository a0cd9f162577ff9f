"""The demo: PyTorch's tutorial with `fastmlp`, beside PyTorch itself, on real data.

Run by `python -m fastmlp demo`. Networks and data are those of tasks.py, trained as training.py says: by PyTorch's
loop, by the same loop on fastmlp's network, by `fastmlp.TrainStep`, and by the loop captured; then served frozen.
report.py shows what was found out. Two things are asserted, and a `DemoFailure` names what broke:

- In float64, at every step, fastmlp and PyTorch start from the same parameters and see the same batch. Their losses
  and every entry of their gradients differ by no more than rounding allows, as do the parameters after a `TrainStep`
  and the outputs of a frozen network. The bound is derived, not tuned: see bounds.py.
- Each classifier reads at least `ACCURACY` of the digits that it was not trained on.

Starting each step from the same parameters keeps the bound sharp, because two runs left to themselves drift apart by
more than rounding: each step amplifies the differences of the steps before it.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import fastmlp
from fastmlp.demo.report import Result, plot, show_network, show_results, summary, threads
from fastmlp.demo.tasks import ACCURACY, Task, digits_tasks, regression_tasks
from fastmlp.demo.training import DemoFailure, compare, race

__all__ = ["EPOCHS", "DemoFailure", "assert_accuracy", "main", "measure"]

EPOCHS = 60
#: Epochs that are compared step by step, which costs several times a training: enough of them to see the end of one,
#: when gradients have become small.
COMPARED_EPOCHS = 20


def measure(tasks: Sequence[Task], epochs: int, seed: int, console: Console) -> list[Result]:
    """Compares and times every task, behind a progress bar where there is a terminal."""
    columns = (TextColumn("{task.description:26}"), BarColumn(), TimeElapsedColumn())
    # The bar is redrawn between epochs, because a thread that redraws it would disturb the timings.
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


def assert_accuracy(results: Sequence[Result]) -> None:
    """Asserts that each classifier learnt to read."""
    for result in results:
        for name, contender in result.race.contenders.items():
            if result.task.classifies and not contender.score() >= ACCURACY:
                raise DemoFailure(
                    f"{result.task.name}: {name} reads {contender.score():.1%} of the held-out digits, "
                    f"at least {ACCURACY:.0%} was expected"
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
    show_results(results, console)
    path = output / "demo.png"
    plot(results, path)
    console.print(f"\nLoss curves: {path}", soft_wrap=True)
    assert_accuracy(results)
    console.print(summary(results), soft_wrap=True)
