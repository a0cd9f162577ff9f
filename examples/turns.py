"""What the examples share: contenders that train in turns, so that whatever else the machine does meets all of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Generic, TypeVar

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

T = TypeVar("T")


@dataclass
class Run(Generic[T]):
    """A contender's training.

    Attributes:
        found: what it yielded, a value for each turn.
        clock: the seconds that it had taken by then.
        seconds: what all of it took.
    """

    found: list[T] = field(default_factory=list)
    clock: list[float] = field(default_factory=list)
    seconds: float = 0.0


def in_turns(contenders: Mapping[str, Callable[[], Iterator[T]]]) -> dict[str, Run[T]]:
    """Runs trainings that yield after each part of them, a part of one and then of the next.

    Each has random numbers of its own, as if it ran alone.
    """
    runs: dict[str, Run[T]] = {name: Run() for name in contenders}
    going = {name: make() for name, make in contenders.items()}
    states = dict.fromkeys(contenders, torch.get_rng_state())
    while going:
        for name, training in list(going.items()):
            run = runs[name]
            torch.set_rng_state(states[name])
            begin = perf_counter()
            try:
                value = next(training)
            except StopIteration:
                del going[name]
                continue
            finally:
                run.seconds += perf_counter() - begin
            states[name] = torch.get_rng_state()
            run.found.append(value)
            run.clock.append(run.seconds)
    return runs


def draw(path: Path, title: str, quantity: str, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """Draws what each contender had reached after how many seconds.

    Args:
        path: of the picture, whose folder is made.
        title: what was trained.
        quantity: what the numbers are.
        curves: for each contender its seconds and its numbers.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)  # no window
    axes = figure.subplots()
    for name, (seconds, values) in curves.items():
        axes.plot(seconds, values, label=name)
    axes.set(title=title, xlabel="seconds of training, one thread", ylabel=quantity)
    axes.legend()
    figure.savefig(path, dpi=120)
