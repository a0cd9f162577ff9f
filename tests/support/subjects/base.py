"""What is compared with itself converted, captured and frozen: a model, its data, and how it is trained and served."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

import fastmlp

__all__ = ["BATCHES", "Described", "Maker", "Step", "Subject", "in_a_loop"]

#: Batches that a program written here has. They come again and again.
BATCHES = 4

#: A step of training on a batch. It returns its loss, without a graph.
Step: TypeAlias = Callable[..., Tensor]

#: Makes the step of a model with its optimizers.
Maker: TypeAlias = "Callable[[Subject, nn.Module, Sequence[torch.optim.Optimizer]], Step]"


def in_a_loop(subject: "Subject", model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Step:
    """Returns the step as its author wrote it."""

    def step(*batch: Tensor) -> Tensor:
        return subject.step(model, optimizers, *batch)

    return step


class Subject:
    """A model with its data.

    Attributes:
        name: of the program.
        package: that has to be there, as it is imported.
        steps: of a training that is compared.
        criterion: compares an output with a target, where the loss is that and nothing else.
        several: why no loop of an input, an output, a loss of that and a target, and an optimizer trains it; empty
            where one does.
        loop: whose loop trains it, where its author writes none.
        examples: whether the forward can only be recorded with an example of its input.
        dtype: of parameters and data.
        small: whether it has the sizes of a test instead of its author's.
    """

    name: str
    package = "torch"
    steps = 10
    criterion: Any = None
    several = ""
    loop = ""
    examples = False

    def __init__(self, dtype: torch.dtype, small: bool = False) -> None:
        self.dtype, self.small = dtype, small

    def randn(self, *shape: int, seed: int) -> Tensor:
        """Makes data, the same in every dtype but for rounding."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.dtype)

    def make(self) -> nn.Module:
        """Returns the model, not converted, with weights from torch's random numbers.

        Several networks are an `nn.ModuleDict` of them.
        """
        raise NotImplementedError

    def convert(self, model: nn.Module, trace: bool) -> nn.Module:
        """Converts what `make` returned, network by network where there are several."""
        if type(model) is nn.ModuleDict:
            model.update({name: fastmlp.convert(network, trace) for name, network in model.items()})
            return model
        return fastmlp.convert(model, trace, self.requests(2) if trace and self.examples else None)

    def outputs(self, model: nn.Module) -> Tensor:
        """Returns what a model in evaluation mode is used for."""
        raise NotImplementedError

    def batch(self, i: int) -> tuple[Tensor, ...]:
        """Returns the arguments of the i-th step."""
        raise NotImplementedError

    def loss(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """Returns the loss of a batch, of a model in training mode."""
        input, target = batch
        return self.criterion(model(input), target)

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """Returns those of a training that begins."""
        return [torch.optim.Adam(model.parameters())]

    def step(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], *batch: Tensor) -> Tensor:
        """Does one step on a batch and returns its loss, without a graph."""
        (optimizer,) = optimizers
        optimizer.zero_grad()
        loss = self.loss(model, *batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def train(self, model: nn.Module, make: Maker = in_a_loop) -> dict[str, Tensor]:
        """Trains a model in training mode by `steps` steps.

        Args:
            model: what `make` returned, or that converted.
            make: returns what does a step. Where the loop is somebody else's, it is not asked.

        Returns:
            What is left besides the model: losses and states of optimizers, by name.
        """
        optimizers = self.optimizers(model)
        step = make(self, model, optimizers)
        found = {"losses": torch.stack([step(*self.batch(i)) for i in range(self.steps)])}
        for i, optimizer in enumerate(optimizers):
            held = [p for group in optimizer.param_groups for p in group["params"]]
            for j, p in enumerate(held):
                state = optimizer.state[p].items()
                found |= {f"optimizer {i}.{j}.{key}": value for key, value in state if isinstance(value, Tensor)}
        return found

    def served(self, model: nn.Module) -> nn.Module:
        """Returns the network that answers requests."""
        return model

    def requests(self, rows: int) -> tuple[Tensor, ...]:
        """Returns the arguments of a call of `served`."""
        raise NotImplementedError


class Described(Subject):
    """A program written here: a subclass sets `data`, tensors with rows for `BATCHES` batches, and says `inputs`."""

    steps = 50
    data: tuple[Tensor, ...]
    inputs = 1

    def size(self, author: int, small: int) -> int:
        """Returns a size as the author has it, or that of a test."""
        return small if self.small else author

    def batch(self, i: int) -> tuple[Tensor, ...]:
        first = i % BATCHES
        rows = [len(tensor) // BATCHES for tensor in self.data]
        return tuple(tensor[first * n : (first + 1) * n] for tensor, n in zip(self.data, rows, strict=True))

    def requests(self, rows: int) -> tuple[Tensor, ...]:
        return tuple(tensor[:rows] for tensor in self.data[: self.inputs])

    def outputs(self, model: nn.Module) -> Tensor:
        found = self.served(model)(*self.requests(self.size(128, 8)))
        return torch.cat([part.flatten() for part in (found if isinstance(found, tuple) else (found,))])
