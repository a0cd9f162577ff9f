"""The demo: PyTorch's tutorial with `fastmlp.Linear`, and converted, beside PyTorch itself, on real data.

Run by `python -m fastmlp demo`. Two things are asserted, and a `DemoFailure` names what broke:

- In float64, at every step, fastmlp and PyTorch start from the same parameters and see the same
  batch. Their losses and every entry of their gradients differ by no more than rounding allows. The
  bound is derived, not tuned: see demo_bounds.py.
- Each classifier reads at least `ACCURACY` of the digits that it was not trained on.

Starting each step from the same parameters keeps the bound sharp. Two runs left to themselves drift
apart by more than rounding, because each step amplifies the differences of the steps before it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import geometric_mean, median
from time import perf_counter

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fastmlp
from fastmlp.demo_bounds import rounding_bounds

__all__ = ["ACCURACY", "EPOCHS", "DemoFailure", "main"]

EPOCHS = 60
#: Of the comparison step by step, which costs three times a training: enough of it to see the end
#: of a training, when gradients have become small.
COMPARED_EPOCHS = 20
ACCURACY = 0.97
BATCH = 32
DIGITS = [64, 128, 64, 10]

Batch = tuple[Tensor, Tensor]
Parameters = Iterable[Tensor]
MakeOptimizer = Callable[[Parameters], torch.optim.Optimizer]


class DemoFailure(AssertionError):
    """Something that the demo asserts does not hold."""


# The tutorial's network, before and after.


class NativeNN(nn.Module):
    """10 features, 50 hidden neurons, one output, as the tutorial writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(10, 50)
        self.fc2 = nn.Linear(50, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The output for (batch, 10)."""
        x = torch.relu(self.fc1(x))
        return self.fc2(x)


class SimpleNN(nn.Module):
    """The same network: `fastmlp.Linear` in place of `nn.Linear`, and nothing else changed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = fastmlp.Linear(10, 50)
        self.fc2 = fastmlp.Linear(50, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The output for (batch, 10)."""
        x = torch.relu(self.fc1(x))
        return self.fc2(x)


def converted_nn() -> nn.Module:
    """The network as the tutorial writes it, with its forward recorded and fused."""
    return fastmlp.convert(NativeNN(), trace=True)


def native_mlp(widths: Sequence[int], activation: type[nn.Module]) -> nn.Module:
    """The children of `fastmlp.MLP`, written by hand."""
    layers: list[nn.Module] = []
    for in_features, out_features in pairwise(widths):
        layers += [nn.Linear(in_features, out_features), activation()]
    return nn.Sequential(*layers[:-1])


# What is learnt.


@dataclass(frozen=True)
class Task:
    """One network to be trained, by both contenders.

    Args:
        name: of data and what is special: optimizer, activation or conversion.
        train: inputs and targets, in float64 where they are real numbers.
        held_out: the same, never trained on.
        native: makes PyTorch's network.
        fast: makes fastmlp's.
        activation: of the hidden layers, for the error analysis.
        loss: of outputs and targets.
        optimizer: of the parameters.
        noise: standard deviation of what is added to the inputs of each epoch.
    """

    name: str
    train: Batch
    held_out: Batch
    native: Callable[[], nn.Module]
    fast: Callable[[], nn.Module]
    activation: str
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: MakeOptimizer
    noise: float = 0.0

    @property
    def classifies(self) -> bool:
        """Whether the targets are classes."""
        return not self.train[1].is_floating_point()


def regression_tasks() -> list[Task]:
    """The tutorial's loop on 442 patients, the course of their diabetes: with SGD, with Adam, and converted."""
    data = load_diabetes(scaled=False)
    parts = train_test_split(data.data, data.target[:, None], test_size=0.25, random_state=0)
    x, x_held_out, y, y_held_out = (torch.as_tensor(part, dtype=torch.float64) for part in parts)
    train = standardise(x, x), standardise(y, y)
    held_out = standardise(x_held_out, x), standardise(y_held_out, y)

    def task(name: str, fast: Callable[[], nn.Module], optimizer: MakeOptimizer) -> Task:
        return Task(f"diabetes, {name}", train, held_out, NativeNN, fast, "relu", nn.MSELoss(), optimizer)

    def adam(parameters: Parameters) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=0.002)

    return [
        task("SGD", SimpleNN, lambda parameters: torch.optim.SGD(parameters, lr=0.02)),
        task("Adam", SimpleNN, adam),
        task("convert", converted_nn, adam),
    ]


def standardise(values: Tensor, reference: Tensor) -> Tensor:
    """Mean 0 and deviation 1, by the columns of the training data: the held-out data stay unseen."""
    return (values - reference.mean(0)) / reference.std(0)


def digits_tasks() -> list[Task]:
    """1797 handwritten digits of 8 x 8 pixels, read with each of three activations."""
    data = load_digits()
    parts = train_test_split(data.data / 16, data.target, test_size=0.25, stratify=data.target, random_state=0)
    x, x_held_out, y, y_held_out = (torch.as_tensor(part) for part in parts)

    def task(activation: type[nn.Module]) -> Task:
        return Task(
            name=f"digits, {activation.__name__}",
            train=(x, y),
            held_out=(x_held_out, y_held_out),
            native=lambda: native_mlp(DIGITS, activation),
            fast=lambda: fastmlp.MLP(DIGITS[0], DIGITS[1:-1], DIGITS[-1], activation),
            activation=activation.__name__.lower(),
            loss=nn.CrossEntropyLoss(),
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01),
            # The network could learn 1347 clean images by heart; noisy ones it has to understand.
            noise=0.2,
        )

    return [task(activation) for activation in (nn.ReLU, nn.Tanh, nn.Sigmoid)]


# How it is learnt.


class Contender:
    """A network in training, with its optimizer and the losses so far."""

    def __init__(self, task: Task, make: Callable[[], nn.Module], dtype: torch.dtype, epochs: int, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = make().to(dtype)
        self.task = task
        self.dtype = dtype
        self.optimizer = task.optimizer(self.model.parameters())
        # A learning rate that ends at 0 lets the last epochs settle.
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs)
        self.losses: list[float] = []

    def train(self, batches: list[Batch]) -> float:
        """One epoch of the tutorial's four steps; returns the seconds that it took."""
        losses = []
        start = perf_counter()
        for x, y in batches:
            self.optimizer.zero_grad()
            loss = self.task.loss(self.model(x), y)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        seconds = perf_counter() - start
        self.schedule.step()
        sizes = torch.tensor([len(x) for x, _ in batches])  # the last batch may be a small one
        self.losses.append((torch.stack(losses) * sizes).sum().item() / int(sizes.sum()))
        return seconds

    def loss_and_gradients(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """The loss, and the gradient of each layer: its weight's, and its bias's as a last column."""
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model(x), y)
        loss.backward()
        return [loss.detach(), *join([p.grad for p in self.model.parameters() if p.grad is not None])]

    def score(self) -> float:
        """On the held-out data: the share of digits read rightly, or the mean squared error."""
        x, y = cast(self.task.held_out, self.dtype)
        with torch.no_grad():
            output = self.model(x)
        right = output.argmax(1) == y if self.task.classifies else None
        return (self.task.loss(output, y) if right is None else right.double().mean()).item()


def both(task: Task, dtype: torch.dtype, epochs: int, seed: int) -> tuple[Contender, Contender]:
    """PyTorch's network and fastmlp's, which the seed must have given the same parameters."""
    native = Contender(task, task.native, dtype, epochs, seed)
    fast = Contender(task, task.fast, dtype, epochs, seed)
    for name, value in native.model.state_dict().items():
        if not torch.equal(value, fast.model.state_dict()[name]):
            raise DemoFailure(f"{task.name}: {name} differs before training, from the same seed {seed}")
    return native, fast


def shuffled(task: Task, dtype: torch.dtype, epochs: int, seed: int) -> Iterator[list[Batch]]:
    """The mini-batches of each epoch, the same for all that have the same seed."""
    generator = torch.Generator().manual_seed(seed)
    x, y = task.train
    for _ in range(epochs):
        noisy = x + task.noise * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        order = torch.randperm(len(x), generator=generator)
        yield [cast((noisy[rows], y[rows]), dtype) for rows in order.split(BATCH)]


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch in another precision; classes stay whole numbers."""
    x, y = batch
    return x.to(dtype), y.to(dtype) if y.is_floating_point() else y


def join(parameters: Sequence[Tensor]) -> list[Tensor]:
    """From weight, bias, weight, bias ... one matrix a layer, with the bias as its last column."""
    return [torch.cat([w, b[:, None]], 1) for w, b in zip(parameters[::2], parameters[1::2], strict=True)]


# How close it stays to PyTorch.


@dataclass
class Agreement:
    """How close fastmlp stayed to PyTorch.

    Args:
        steps: compared.
        loss: largest difference of two losses.
        share: of its bound, the largest that a difference reached; 0 where there are no bounds.
    """

    steps: int = 0
    loss: float = 0.0
    share: float = 0.0


def compare(task: Task, dtype: torch.dtype, epochs: int, seed: int, tick: Callable[[], None]) -> Agreement:
    """Trains PyTorch's network and has fastmlp repeat each step from the same parameters.

    Args:
        task: what is trained.
        dtype: float64 for differences that are asserted, float32 for differences that are shown.
        epochs: number of passes over the data.
        seed: of parameters and batches.
        tick: called after each epoch.

    Returns:
        The largest differences.

    Raises:
        DemoFailure: if a float64 difference is more than rounding allows.
    """
    native, fast = both(task, dtype, epochs, seed)
    found = Agreement()
    for batches in shuffled(task, dtype, epochs, seed):
        for x, y in batches:
            state = native.model.state_dict()
            fast.model.load_state_dict(state)
            expected, actual = native.loss_and_gradients(x, y), fast.loss_and_gradients(x, y)
            differences = [(a - b).abs() for a, b in zip(expected, actual, strict=True)]
            found.steps += 1
            found.loss = max(found.loss, differences[0].item())
            if dtype == torch.float64:
                bounds = rounding_bounds(task.activation, join(list(state.values())), x, y)
                found.share = max(found.share, assert_within(differences, bounds, f"{task.name}, step {found.steps}"))
            native.optimizer.step()
        native.schedule.step()
        tick()
    return found


def assert_within(differences: Sequence[Tensor], bounds: Sequence[Tensor], where: str) -> float:
    """Asserts that no difference exceeds twice its bound, and returns the largest share reached."""
    largest = 0.0
    for i, (difference, bound) in enumerate(zip(differences, bounds, strict=True)):
        # 0 / 0 occurs, at neurons that no input of the batch wakes; NaN stays NaN and fails.
        share = torch.where(difference == 0, 0.0, difference / (2 * bound)).flatten()
        worst = int(share.argmax())
        if not share[worst] <= 1:
            what = f"gradient of layer {i}" if i else "loss"
            raise DemoFailure(
                f"{where}: {what} differs from PyTorch's by {difference.flatten()[worst]:.3g}, "
                f"of which rounding in float64 explains at most {2 * bound.flatten()[worst]:.3g}"
            )
        largest = max(largest, share[worst].item())
    return largest


# How fast it is learnt.


@dataclass
class Race:
    """Both trainings in float32, each on its own: the contenders, and the seconds of each epoch."""

    native: Contender
    fast: Contender
    native_seconds: list[float]
    fast_seconds: list[float]

    @property
    def speedup(self) -> float:
        """PyTorch's median epoch over fastmlp's."""
        return median(self.native_seconds) / median(self.fast_seconds)


def race(task: Task, epochs: int, seed: int, tick: Callable[[], None]) -> Race:
    """Trains both, epoch by epoch in turn, so that whatever else the machine does meets both."""
    for warm_up in both(task, torch.float32, epochs, seed):
        warm_up.train(next(shuffled(task, torch.float32, epochs, seed)))
    run = Race(*both(task, torch.float32, epochs, seed), [], [])
    for batches in shuffled(task, torch.float32, epochs, seed):
        run.native_seconds.append(run.native.train(batches))
        run.fast_seconds.append(run.fast.train(batches))
        tick()
    return run


# What is shown.

HEADERS = (
    "float64\ndiff.",
    "of\nbound",
    "float32\ndiff.",
    "held out\nPyTorch",
    "\nfastmlp",
    "ms/epoch\nPyTorch",
    "\nfastmlp",
    "\nratio",
)
CAPTION = f"""
convert: the network of nn.Linear and torch.relu, fused by fastmlp.convert, trained with Adam.
diff.: the largest difference of two losses in steps from the same parameters.
float64: asserted at every step: loss and all gradients differ by no more than rounding explains (a \
running error analysis, see fastmlp/demo_bounds.py). "of bound": the largest share of that which was used.
float32: shown, not asserted.
held out: digits read rightly, asserted to be at least {ACCURACY:.0%}; for diabetes the mean squared \
error. Each of these trainings ran on its own, in float32.
ms/epoch: median, in turn, after a warm-up, {{threads}}, {BATCH} samples a step. \
ratio: PyTorch's time over fastmlp's."""


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


def table_of(results: Sequence[Result]) -> Table:
    """One row for each task."""
    table = Table(caption=CAPTION.format(threads=threads()), caption_justify="left", box=None, pad_edge=False)
    table.collapse_padding = True
    table.add_column("\ntraining", no_wrap=True)
    for header in HEADERS:
        table.add_column(header, justify="right", no_wrap=True)
    for result in results:
        table.add_row(*row_of(result))
    return table


def row_of(result: Result) -> list[str]:
    """The cells of one task."""
    run = result.race
    score = "{:.1%}" if result.task.classifies else "{:.3f}"
    return [
        result.task.name,
        f"{result.float64.loss:.1e}",
        f"{result.float64.share:.1%}",
        f"{result.float32.loss:.1e}",
        score.format(run.native.score()),
        score.format(run.fast.score()),
        f"{1e3 * median(run.native_seconds):.1f}",
        f"{1e3 * median(run.fast_seconds):.1f}",
        f"{run.speedup:#.2g}",
    ]


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
    """Curves of both contenders: fastmlp's dashes lie on PyTorch's broad, pale lines."""
    for i, result in enumerate(results):
        name = result.task.name.split(", ")[1]
        epochs = range(1, len(result.race.native.losses) + 1)
        axes.plot(epochs, result.race.native.losses, color=f"C{i}", alpha=0.35, linewidth=5, label=f"{name}, PyTorch")
        axes.plot(epochs, result.race.fast.losses, color=f"C{i}", linestyle="--", label=f"{name}, fastmlp")
    axes.set(title=title, xlabel="epoch", ylabel=f"training loss ({loss}), float32")
    axes.grid(alpha=0.3)
    axes.legend()


def assert_accuracy(results: Sequence[Result]) -> None:
    """Asserts that each classifier learnt to read."""
    for result in results:
        for name, contender in (("PyTorch", result.race.native), ("fastmlp", result.race.fast)):
            if result.task.classifies and not contender.score() >= ACCURACY:
                raise DemoFailure(
                    f"{result.task.name}: {name} reads {contender.score():.1%} of the held-out digits, "
                    f"at least {ACCURACY:.0%} was expected"
                )


def summary(results: Sequence[Result]) -> str:
    """What was proved, in one line."""
    steps = sum(result.float64.steps for result in results)
    share = max(result.float64.share for result in results)
    accuracy = min(result.race.fast.score() for result in results if result.task.classifies)
    speedup = geometric_mean([result.race.speedup for result in results])
    return (
        f"Proved: in {steps} float64 steps fastmlp equals PyTorch within rounding (using {share:.1%} of the bound), "
        f"and reads {accuracy:.1%} of unseen digits or more; measured: {speedup:#.2g} times PyTorch's speed."
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
    console.print(table_of(results))
    path = output / "demo.png"
    plot(results, path)
    console.print(f"\nLoss curves: {path}", soft_wrap=True)
    assert_accuracy(results)
    console.print(summary(results), soft_wrap=True)
