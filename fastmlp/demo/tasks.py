"""What the demo trains: the tutorial's network in several guises, and the data.

Called by training.py to train them, and by report.py to show the tutorial's network.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fastmlp

__all__ = ["ACCURACY", "BATCH", "DIGITS", "Batch", "Task", "cast", "digits_tasks", "regression_tasks", "shuffled"]

BATCH = 32
DIGITS = [64, 128, 64, 10]
#: The share of the digits that it was not trained on which each classifier must read, at least.
ACCURACY = 0.97

Batch = tuple[Tensor, Tensor]
Parameters = Iterable[Tensor]
MakeOptimizer = Callable[[Parameters], torch.optim.Optimizer]


# The tutorial's network, with torch's layers and with ours.


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
    """One network to be trained, by all contenders.

    Args:
        name: of data and what is special: optimizer, activation or conversion.
        train: inputs and targets, in float64 where they are real numbers.
        held_out: the same, never trained on.
        native: makes PyTorch's network, which TrainStep trains and freeze serves as well.
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
    loss: nn.Module
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
            # Noise is added, because the network could learn 1347 clean images by heart.
            noise=0.2,
        )

    return [task(activation) for activation in (nn.ReLU, nn.Tanh, nn.Sigmoid)]


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
